from __future__ import annotations

import json
import platform

import pytest
import torch

from exitsafe.errors import InputError
from exitsafe.vlm.machine import describe_machine


def test_a_machine_is_numbers_and_names_of_things() -> None:
    found = describe_machine(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert platform.node() not in json.dumps(found)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="device cuda:99 is not there"):
        describe_machine(torch.device("cuda:99"))
