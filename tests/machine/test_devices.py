from __future__ import annotations

import json
import platform
from types import SimpleNamespace

import pytest
import torch

from exitsafe.errors import InputError
from exitsafe.machine import processes
from exitsafe.machine.devices import describe_machine, find_device, find_dtype


def test_a_machine_is_numbers_and_names_of_things() -> None:
    found = describe_machine(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert platform.node() not in json.dumps(found)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"device 'cuda:99': torch sees . GPUs here; choose auto or cpu"):
        find_device("cuda:99")


def test_devices_and_types_by_name() -> None:
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert find_dtype("auto") is None
    assert find_dtype("bfloat16") == find_dtype(torch.bfloat16) == torch.bfloat16


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "this_process", lambda: SimpleNamespace(local_process_index=0))
    assert find_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(processes, "this_process", lambda: SimpleNamespace(local_process_index=3))
    assert find_device("auto") == torch.device("cuda", 3)
    assert find_device("cpu") == torch.device("cpu")
