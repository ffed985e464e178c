"""Tests of the refusal of exports that do not fit into memory or on the disk."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import resources


def test_model_larger_than_the_memory_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    parts = ("unet", "vae", "safety_checker", "image_encoder")
    for part in parts:
        (tmp_path / "model" / part).mkdir(parents=True)
    index = {part: ["library", "class"] for part in parts} | {"image_encoder": [None, None], "_class_name": "Pipeline"}
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    vae, weights = tmp_path / "model/vae", {"w": torch.zeros(1000, 500)}
    name = "diffusion_pytorch_model"
    save_file({"w": torch.zeros(1000, 1000, dtype=torch.float16)}, tmp_path / f"model/unet/{name}.safetensors")
    for shard in ("1", "2"):
        save_file({shard: torch.zeros(500, 500)}, vae / f"{shard}.safetensors")
    (vae / f"{name}.safetensors.index.json").write_text('{"weight_map": {"1": "1.safetensors", "2": "2.safetensors"}}')
    # Never read: variants, the safety checker, and what the pipeline has not.
    for unread in (f"unet/{name}.fp16", f"vae/{name}.non_ema", "safety_checker/model", "image_encoder/model"):
        save_file(weights, tmp_path / f"model/{unread}.safetensors")
    # 1.5 million parameters are 6 MB in float32, whatever the files hold.
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 6 * 10**6 - 1)
    with pytest.raises(RefusedInputError, match=r"model takes 0.0 GB of memory in float32, have 0.0: make room"):
        resources.check_memory_to_load(str(tmp_path / "model"))
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 6 * 10**6)
    resources.check_memory_to_load(str(tmp_path / "model"))
    resources.check_memory_to_load("a/hub-id")
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2 * 10**6 - 1)
    with pytest.raises(RefusedInputError, match="model takes"):
        resources.check_memory_to_load(str(tmp_path / "model"), "fp16")  # half a million parameters
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2 * 10**6)
    resources.check_memory_to_load(str(tmp_path / "model"), "fp16")


def test_export_needs_memory_for_two_copies_of_the_largest_graph_and_disk_for_all(tmp_path, monkeypatch):
    weights = {"unet": 4 * 10**9, "vae_decoder": 10**9}
    memory, disk = 8 * 10**9 + 700 * 2**20, int(5.5 * 10**9) + 2**20

    def check(free_memory, free_disk):
        monkeypatch.setattr(resources, "available_memory_bytes", lambda: free_memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free_disk))
        resources.check_resources(weights, tmp_path / "out")

    check(memory, disk)
    check(None, disk)  # a system that does not say
    for free_memory, free_disk in ((memory - 1, disk), (memory, disk - 1)):
        with pytest.raises(RefusedInputError, match=r"need 8\.7 GB of free memory and 5\.5 GB of disk, have 8\.7 and"):
            check(free_memory, free_disk)
