"""List the most used options of kohya's sd-scripts and of diffusers, with what to give to `d2f` in their place."""

from collections.abc import Mapping

_LENGTH = "give --max_train_steps; a run says how many epochs they are"
_CHECKPOINTS = "give --checkpointing_steps, in steps"
_PLACE = "give --output_dir; the files in it are named after it"
_UNET_ONLY = "the UNet alone is trained: leave it out"
_ADAMW = "the optimizer is AdamW, with --adam_beta1, --adam_beta2, --adam_epsilon and --adam_weight_decay: leave it out"
_SAFETENSORS = "files are safetensors, and --lora_format says for which programs"
_V_PREDICTION = "it is read from the model; to state it, give --prediction_type v_prediction"
_FAMILY = "the family is read from the model: leave it out"
_ATTENTION = "attention is PyTorch's own fused one: leave it out"
_SIZE = "give --resolution"
_AUTHOR = "nothing is uploaded: leave it out, and upload the output folder"

# By command; a name is that of train_network.py and sdxl_train_network.py, of diffusers' train_text_to_image_lora.py
# and train_dreambooth_lora.py, or of gen_img.py and the pipelines.
FOREIGN_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "train": {
        # kohya
        "network_dim": "give --rank",
        "network_alpha": "give --lora_alpha",
        "network_module": "a LoRA is what --adapter trains by default: leave it out",
        "network_args": "give --conv_rank or --target_modules",
        "network_weights": "give --init_lora",
        "network_train_unet_only": _UNET_ONLY,
        "dim_from_weights": "the rank is that of --init_lora by default: leave it out",
        "unet_lr": "give --learning_rate",
        "text_encoder_lr": _UNET_ONLY,
        "max_train_epochs": _LENGTH,
        "save_every_n_steps": _CHECKPOINTS,
        "save_every_n_epochs": _CHECKPOINTS,
        "save_last_n_steps": "give --checkpoints_total_limit, in checkpoints",
        "save_state": "each checkpoint holds the whole state: leave it out",
        "save_model_as": _SAFETENSORS,
        "save_precision": "weights are saved in float32; `d2f convert --dtype` changes it",
        "output_name": _PLACE,
        "dataset_config": "give --train_data_dir; folders named 10_name are repeated 10 times",
        "reg_data_dir": "there are no regularisation images: leave it out",
        "vae": "give --pretrained_vae_model_name_or_path",
        "v2": _FAMILY,
        "sdxl": _FAMILY,
        "v_parameterization": _V_PREDICTION,
        "zero_terminal_snr": "give --rescale_betas_zero_snr",
        "min_snr_gamma": "give --snr_gamma",
        "optimizer_type": _ADAMW,
        "optimizer_args": _ADAMW,
        "lr_scheduler_num_cycles": "--lr_scheduler cosine_with_restarts has one cycle: leave it out",
        "cache_latents_to_disk": "give --cache_latents, which is on by default; --cache_dir names the folder",
        "enable_bucket": "images are cropped to --resolution, which may be a size for each folder: leave it out",
        "flip_aug": "give --random_flip",
        "random_crop": "give --no_center_crop and --no_cache_latents",
        "shuffle_caption": "captions are used as they are: leave it out",
        "caption_dropout_rate": "give --caption_dropout",
        "max_data_loader_n_workers": "give --dataloader_num_workers",
        "resume": "give --resume_from_checkpoint",
        "xformers": _ATTENTION,
        "sdpa": _ATTENTION,
        "validate_every_n_steps": "give --validation_steps",
        "validation_split": "give --validation_data_dir, a folder of held-out images",
        "sample_prompts": "give --validation_prompts and --validation_steps",
        "sample_every_n_steps": "give --validation_steps",
        "log_with": "give --report_to",
        # diffusers
        "model": "give --pretrained_model_name_or_path",
        "dataset_name": "give --train_data_dir with a folder of images and captions",
        "instance_data_dir": "give --train_data_dir with a folder of images and captions",
        "instance_prompt": "write it into a caption file beside each image",
        "num_train_epochs": _LENGTH,
        "max_train_samples": "give --train_data_dir with fewer images",
        "use_ema": "the average is kept by default; --ema_decay 0 turns it off",
        "use_8bit_adam": _ADAMW,
        "optimizer": _ADAMW,
        "scale_lr": "give the scaled value as --learning_rate",
        "lr": "give --learning_rate",
        "noise_offset": "the noise has no offset: leave it out",
        "proportion_empty_prompts": "give --caption_dropout",
        "enable_xformers_memory_efficient_attention": _ATTENTION,
        "allow_tf32": "give --mixed_precision bf16 to be faster",
        "train_text_encoder": _UNET_ONLY,
        "validation_prompt": "give --validation_prompts and --validation_steps",
        "validation_epochs": "give --validation_steps",
        "push_to_hub": _AUTHOR,
        "hub_model_id": _AUTHOR,
        "non_ema_revision": "give --revision",
        "logging_dir": "logs are written to --output_dir: leave it out",
        "batch_size": "give --train_batch_size",
        "steps": "give --max_train_steps",
        "width": _SIZE,
        "height": _SIZE,
    },
    "sample": {
        # kohya
        "ckpt": "give --model",
        "outdir": "give --output_dir",
        "network_weights": "give --lora FILE",
        "network_mul": "give the scale with the file, as --lora FILE:0.8",
        "network_module": "the kind of a LoRA is read from its file: leave it out",
        "scale": "give --guidance_scale",
        "steps": "give --num_inference_steps",
        "images_per_prompt": "give the prompt several times",
        "n_iter": "give the prompt several times",
        "sampler": "give --method and --flow_spacing",
        "negative": "give --negative_prompt",
        "clip_skip": "the text encoder's last layer is used: leave it out",
        "W": "give --width",
        "H": "give --height",
        "vae": "give --pretrained_vae_model_name_or_path",
        "from_file": 'give the prompts as --prompts "first" "second"',
        # diffusers
        "prompt": "give --prompts",
        "pretrained_model_name_or_path": "give --model",
        "lora_scale": "give the scale with the file, as --lora FILE:0.8",
        "num_images_per_prompt": "give the prompt several times",
        "num_steps": "give --num_inference_steps",
        "cfg": "give --guidance_scale",
        "cfg_scale": "give --guidance_scale",
        "guidance": "give --guidance_scale",
        "scheduler": "give --method and --flow_spacing",
        "flow_shift": "give --shift",
        "output": "give --output_dir",
        "resolution": "give --height and --width",
    },
}
