"""What lmms-eval finds by its entry point: the model's name and where its class is, imported when it is asked for."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(model_id="exitsafe", chat_class_path="exitsafe.integrations.lmms_model.ExitsafeLMM")
