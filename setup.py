"""Install hf_qie: `pip install -e .` for use, `pip install -e ".[test,quality]"` to work on it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hf_qie",
    version="0.1.0",
    description="Fine-tune Qwen-Image-Edit and Qwen-Image-2.1 with datasets, transformers.Trainer and accelerate",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hf_qie", "hf_qie.*"]),
    package_data={"hf_qie": ["**/*.safetensors", "**/*.md"]},
    # Each floor is the oldest release that has what we call; the set we test is in constraints.txt.
    install_requires=[
        "torch>=2.8",  # FSDP2's and distributed checkpoint's present names
        "torchvision>=0.23",  # the Qwen2-VL processor does not load without it
        # mm_token_type_ids in the processor and in get_rope_index; below the next release, as training/trainer.py
        # overrides private methods of Trainer
        "transformers>=5.23,<5.25",
        # QwenImageTransformer2DModel with masks, zero_cond_t and without txt_seq_lens; below the next release, as
        # check.py --verify calls private methods of the pipelines
        "diffusers>=0.42,<0.43",
        "datasets>=5.2",  # float16 lists in Arrow and Parquet, async map
        "accelerate>=1.15",  # FSDP2 saves LoRA adapters of every rank
        "peft>=0.21",
        "huggingface_hub>=2.0",
        "httpx2>=2.0",  # reads images from URLs; the Hub client's own, a continuation of httpx with the same interface
        "filelock>=4",  # one launch at a time in a folder; a forked child does not keep the lock of a killed one
        "jinja2>=3.1",  # cards
        "safetensors>=0.8",
        "pyarrow>=21",
        "pyyaml>=6.0.2",
        "pydantic>=2.10",  # the recipe; the first whose default factories see the keys before them
        "pillow>=11.3",  # AVIF in its wheels
        "numpy>=2.0",
        "scikit-image>=0.25",  # scores of edits; footprint_rectangle
        "tqdm>=4.67",
        "matplotlib>=3.9",  # charts of losses and noise levels; the first that runs on numpy 2
    ],
    extras_require={
        "heif": ["pillow-heif>=1.0"],  # images as phones save them
        "quantization": ["torchao>=0.18", "bitsandbytes>=0.50"],  # memory.quantization, and optimizers of 8 bits
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "tensorboard>=2.20",  # images and metrics in a tracker are read back from its files
            "hypothesis>=6.140",
            "pillow-heif>=1.0",
            "torchao>=0.18",
            "bitsandbytes>=0.50",
            "dashscope>=1.25",  # ships the real Qwen vocabulary: template and drop count are tested against it
        ],
        "quality": ["ruff>=0.14"],
    },
)
