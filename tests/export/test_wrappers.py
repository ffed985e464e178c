"""Tests of the modules that are traced, and of the sizes at which they are traced and verified."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from d2f_fast.errors import ModelError
from d2f_fast.export.wrappers import (
    check_sizes,
    example_sizes,
    text_encoder_component,
    unet_component,
    vae_components,
)


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def components(pipeline):
    encoder = text_encoder_component(pipeline.text_encoder, "text_encoder")
    return {c.name: c for c in (unet_component(pipeline.unet), encoder, *vae_components(pipeline.vae))}


def test_ports_have_optimums_names(components):
    ports = {name: ([p.name for p in c.inputs], [p.name for p in c.outputs]) for name, c in components.items()}
    assert ports == {
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "text_encoder": (
            ["input_ids"],
            ["last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1"],
        ),
        "vae_encoder": (["sample"], ["latent_parameters"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }


def buffer_shape(dims, known):
    """Return the shape of an output as optimum computes it on a GPU, before the graph runs."""

    def size(name):
        if isinstance(name, int) or name in known:
            return known.get(name, name)
        # optimum puts the sizes of the inputs into the expression, and evaluates it.
        words = [str(known.get(word, word)) for word in re.findall(r"[a-zA-Z_]+|[0-9]+|[+\-/*()]", name)]
        return int(eval(" ".join(words)))

    return [size(name) for name in dims]


def test_sizes_of_outputs_follow_from_the_names_of_their_dimensions(components):
    for component in components.values():
        for sizes in check_sizes(component):
            with torch.no_grad():
                found = component.module(*component.make_inputs(sizes, seed=0).values())
            found = found if isinstance(found, tuple) else (found,)
            shapes = [buffer_shape(port.dims, sizes) for port in component.outputs]
            assert shapes == [list(tensor.shape) for tensor in found]


@pytest.mark.parametrize(
    ("option", "value", "taken"),
    [
        ("time_cond_proj_dim", 8, "the guidance scale (LCM)"),
        ("class_embed_type", "timestep", "class labels"),
        ("num_class_embeds", 10, "class labels"),
        ("encoder_hid_dim_type", "text_proj", "another text or an image"),
        ("addition_embed_type", "text", "an embedding beside the time's other than SDXL's"),
        ("cross_attention_dim", [16, 16], "texts of several widths"),
    ],
)
def test_network_with_an_unsupported_input_is_refused(option, value, taken, pipeline):
    added = {"encoder_hid_dim": 16} if option == "encoder_hid_dim_type" else {}
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, option: value, **added})
    with pytest.raises(ModelError, match=rf"with {option} .* takes {re.escape(taken)}.*leave unet and sampler out"):
        unet_component(unet)


def test_outputs_are_those_of_the_pipeline(components, pipeline):
    with torch.no_grad():
        for component in components.values():
            given = component.make_inputs(check_sizes(component)[0], seed=1)
            found = component.module(*given.values())
            if component.name == "unet":
                want = pipeline.unet(given["sample"], given["timestep"], given["encoder_hidden_states"]).sample
            elif component.name == "text_encoder":
                found, want = found[0], pipeline.text_encoder(given["input_ids"])[0]
            elif component.name == "vae_encoder":
                found, want = found.chunk(2, 1)[0], pipeline.vae.encode(given["sample"]).latent_dist.mean
            else:
                want = pipeline.vae.decode(given["latent_sample"]).sample
            assert torch.equal(found, want)


def test_half_precision_modules_take_float32_and_do_not_round_the_timestep(components):
    component = components["unet"]
    given = component.make_inputs(check_sizes(component)[0], seed=1)
    seen = []
    hook = component.module.unet.time_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        component.module.to(torch.bfloat16)
        output = component.module(given["sample"], torch.tensor(673.16), given["encoder_hidden_states"])
    finally:
        hook.remove()
        component.module.to(torch.float32)
    assert output.dtype == torch.float32
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [pytest.approx(673.16)]


def test_token_ids_end_and_are_padded_by_the_end_token(components):
    component = components["text_encoder"]
    ids = component.make_inputs({"batch": 3, "sequence": 8}, seed=1)["input_ids"]
    end = component.config.eos_token_id
    assert ids.dtype == torch.int64 and (ids[:, -1] == end).all() and (ids[:, 0] != end).all()
    assert len({int((row == end).sum()) for row in ids}) == 3


def test_sizes_are_multiples_and_none_is_a_constant(components):
    for component in components.values():
        example = example_sizes(component)
        assert min(example.values()) >= 2
        for sizes in check_sizes(component):
            assert sizes != example and sizes.keys() == example.keys()
            assert all(size % component.multiples.get(name, 1) == 0 for name, size in sizes.items())
