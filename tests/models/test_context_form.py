"""Where the pipelines of diffusers put the latents of images, and in which scale."""

from d2f_fast.models.context_form import context_form


def test_form_is_that_of_the_pipeline_of_diffusers() -> None:
    assert context_form("StableDiffusionInstructPix2PixPipeline") == (False, False)
    assert context_form("StableDiffusionXLInstructPix2PixPipeline", cosxl=True) == (False, True)
    assert context_form("MarigoldDepthPipeline") == context_form("StableDiffusionPipeline") == (True, True)
