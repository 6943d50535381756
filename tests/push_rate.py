"""How fast shards of a set of real width are prepared: python tests/push_rate.py [rows]."""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from hf_qie.data.schema import set_features, to_table
from hf_qie.hub.publish import write_shard

WIDTH = 3584


def measure(folder: Path, *, rows: int) -> float:
    """MB of Arrow a second of processor time, for rows like those of Edit-Plus at 512 and 1024 pixels."""
    generator = torch.Generator().manual_seed(0)

    def matrix(num_tokens: int, width: int) -> np.ndarray:
        return torch.randn(num_tokens, width, generator=generator).bfloat16().half().numpy()

    wanted = [
        {
            "row": row,
            "source_image": [f"/data/images/source_{row}.png"],
            "target_image": f"/data/images/target_{row}.png",
            "instruction": "Give the woman on the left a red hat",
            "num_sources": 1,
            "image_embeds": matrix(216, WIDTH),
            "text_embeds_instruction": matrix(30 + row % 40, WIDTH),
            "text_embeds_drop": matrix(6, WIDTH),
            "target_latents": matrix(1024, 64),
            "target_grid": [32, 32],
            "source_latents": matrix(4096, 64),
            "source_grids": [[64, 64]],
        }
        for row in range(rows)
    ]
    features = set_features(
        width=WIDTH, latent_width=64, captions=["instruction"], inverse_captions=(), inverse_latents=False
    )
    table = to_table(wanted, features)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    data = Dataset.from_file(str(folder / "rows.arrow"))
    started = time.process_time()
    write_shard(data, range(rows), folder / "shard.parquet", roots=[Path("/data/images")])
    return table.nbytes / 1e6 / (time.process_time() - started)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"{measure(Path(folder), rows=int(sys.argv[1]) if len(sys.argv) > 1 else 256):.0f} MB/s of one core")
