"""The shapes of the released checkpoints, for what is counted on the meta device: no weight is read."""

import json
from pathlib import Path

TRANSFORMER = {  # transformer/config.json of Qwen-Image-Edit-2509
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
SCHEDULER = {  # scheduler/scheduler_config.json, as far as training reads it
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "use_dynamic_shifting": True,
}
NUM_PARAMETERS = 20_430_401_088  # as the sum over the released safetensors

ENCODER = {  # text_encoder/config.json: Qwen2.5-VL-7B
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": False,
}
NUM_ENCODER_PARAMETERS = 8_292_166_656
WIDTH = 3584  # of prompt states


# by pipeline; what diffusers' class of Qwen-Image-2.1 has by default is the released shape
TRANSFORMERS = {
    "QwenImageEditPlusPipeline": TRANSFORMER,
    "QwenImage21Pipeline": {"_class_name": "QwenImage21Transformer2DModel", "in_channels": 64, "context_in_dim": 4096},
}


def write_released(folder: Path, pipeline: str = "QwenImageEditPlusPipeline") -> Path:
    """A checkpoint of which there is nothing but the pipeline's name and two configs."""
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (folder / "transformer" / "config.json").write_text(json.dumps(TRANSFORMERS[pipeline]))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder
