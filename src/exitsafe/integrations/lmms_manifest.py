"""The entry point for lmms-eval: the model's name and its class, which is imported when it is first used."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(model_id="exitsafe", chat_class_path="exitsafe.integrations.lmms_model.ExitsafeLMM")
