"""Files that do not give the adapter in memory are found out, by this package's reading and by that of diffusers."""

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.lora import reload
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.write import lora_state_dict, save_lora


@pytest.mark.parametrize(("part", "factor"), [(".alpha", 2.0), (".lora_up.weight", 1.01)])
def test_kohya_file_with_other_numbers_is_refused(
    tmp_path: Path, unet: Any, randomize: Any, part: str, factor: float
) -> None:
    inject_lora(unet, 2)
    randomize(unet)
    path = save_lora(unet, tmp_path, lora_format="kohya")
    reload.check_kohya_file(unet, path)
    tensors, header = read_tensors(path)
    write_tensors(
        path, {key: value * factor if key.endswith(part) else value for key, value in tensors.items()}, header
    )
    with pytest.raises(ModelError, match=r"does not reload to the same output \(relative difference \d"):
        reload.check_kohya_file(unet, path)


def test_adapter_read_back_without_a_layer_differs_infinitely(unet: Any, randomize: Any) -> None:
    inject_lora(unet, 2)
    randomize(unet)
    tensors, _ = lora_state_dict(unet)
    first = next(iter(tensors)).partition(".lora_")[0]
    fewer = {key: value for key, value in tensors.items() if not key.startswith(first)}
    ranks = {key.removeprefix("unet.").partition(".lora_")[0]: 2 for key in fewer}
    metadata = reload.uniform_scale_metadata(ranks)
    assert reload.reloaded_difference(unet, fewer, metadata=metadata) == math.inf


def test_diffusers_reads_the_kohya_files_of_known_families(
    tmp_path: Path, make_family_unet: Any, randomize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that diffusers' own reading, with an alpha for each layer, is what the output is compared with."""
    network = make_family_unet("sd1", layers_per_block=1)
    inject_lora(network, 2, target_modules=["to_q", "ff.net.2"], first_last_layers=True)
    randomize(network)
    options: list[list[str]] = []
    compare = reload.reloaded_difference

    def recording(unet: Any, tensors: dict[str, Tensor], **given: Any) -> float:
        options.append(list(given))
        return compare(unet, tensors, **given)

    monkeypatch.setattr(reload, "reloaded_difference", recording)
    save_lora(network, tmp_path, lora_format="both")
    assert options == [["metadata"], ["network_alphas"]]
