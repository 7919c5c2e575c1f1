"""A vLLM server as an audit sees it: a model in this process answers from the embeddings that it is sent."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.records import Sample
from tests.judges.chat_server import Answer, ChatServer, failing, serving
from tests.tiny_models import noise_image

Change = Callable[[dict[str, Any], int], "Answer | None"]


@dataclass
class FakeVLLM:
    """What the server is and does.

    Args:
        vlm: The model that it serves.
        model: The only entry of its list of models.
        version: Its version; None if it has no such path.
        embeds: Whether image embeddings are switched on.
        change: Called with each completion and its number, to change it or to answer something else.
    """

    vlm: VLM
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": "served", "owned_by": "vllm", "max_model_len": 128}]
    )
    version: str | None = "0.32.0"
    embeds: bool = True
    change: Change = lambda completion, number: None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.chat = ChatServer(self.answer)

    def running(self) -> AbstractContextManager[str]:
        """Its address, while it runs."""
        paths = {"/v1/models": Answer(body=json.dumps({"data": self.models}).encode())}
        if self.version is not None:
            paths["/version"] = Answer(body=json.dumps({"version": self.version}).encode())
        return serving(self.chat, paths=paths)

    def answer(self, body: dict[str, Any], number: int) -> Answer:
        *system, user = body["messages"]
        *pictures, text = user["content"]
        if pictures and not self.embeds:
            return failing(400)
        with self._lock, torch.no_grad():
            completion = self._complete(body, system, pictures, text["text"])
        return self.change(completion, number) or Answer(body=json.dumps(completion).encode())

    def _complete(self, body: dict[str, Any], system: list[Any], pictures: list[Any], text: str) -> dict[str, Any]:
        blank = tuple(noise_image(0) for _ in pictures)  # as many tokens as any other picture
        said = system[0]["content"] if system else ""
        prompt = self.vlm.encode_prompt(Sample(id="any", prompt=text, images=blank, system=said, kind="benign"))
        embeds = [torch.load(io.BytesIO(base64.b64decode(each["image_embeds"]))) for each in pictures]
        output: Any = BaseModelOutputWithPooling
        features = {"image": output(pooler_output=embeds)} if embeds else None
        row = Row(prompt=prompt, exit_layer=1, features=features)
        sampling = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "seed": body["seed"]}
        ((_, found),) = self.vlm.complete([row], batch_size=1, **sampling)
        tokens = torch.tensor(found.token_ids)
        hidden, _, _ = self.vlm.response_states([row], [tokens])
        values, ids = self.vlm.logits(hidden)[0].log_softmax(dim=-1).topk(5)
        places = [
            [{"token": f"token_id:{each}", "logprob": value} for each, value in zip(*top, strict=True)]
            for top in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return {
            "model": "served",
            "prompt_token_ids": prompt.input_ids.tolist(),
            "usage": {"prompt_tokens": len(prompt.input_ids), "completion_tokens": len(tokens)},
            "choices": [
                {
                    "message": {"role": "assistant", "content": self.vlm.decode(found.token_ids)},
                    "finish_reason": found.finish_reason,
                    "token_ids": tokens.tolist(),
                    "logprobs": {"content": [{**place[0], "top_logprobs": place} for place in places]},
                }
            ],
        }
