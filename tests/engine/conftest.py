from tests.vlm_fixtures import samples, vlm

__all__ = ["samples", "vlm"]
