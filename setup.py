"""Packaging of `vlm`: `pip install -e '.[dev]'`. The tested versions: requirements/pins.txt (make env uses them).

The upper bound on torch matters: without it pip takes a newer torch with other CUDA packages than those tested.
"""

from setuptools import find_packages, setup

setup(
    name="vlm",
    version="0.1.0",
    description="Train, evaluate, chat with and convert video-language models on one DeepSpeed engine",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vlm", "vlm.*"]),
    install_requires=[
        "torch>=2.8,<2.14",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "accelerate>=1.1",
        "sentencepiece>=0.2.3",
        "tiktoken>=0.7",
        "protobuf>=4",
        "safetensors>=0.5",
        "webdataset>=1.0,<2",
        "av>=17",
        "decord>=0.6; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "einops>=0.8",
        "numpy>=2.0",
        "pillow>=11",
        "wandb>=0.19",
        "psutil",
        "requests>=2.31",
        "fsspec>=2024.2",
        "ninja",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8,<3"],
        "mpi": ["mpi4py>=4"],
        "metrics": ["pycocoevalcap>=1.2,<2"],
        "remote": ["s3fs>=2024.2"],
        "quantise": ["bitsandbytes>=0.46"],
        "chat": ["gradio>=6,<7"],
        "dev": ["pytest>=8", "ruff>=0.9", "mypy>=1.14", "mpi4py>=4", "gradio>=6,<7", "playwright>=1.50"],
    },
)
