"""The Hub that tests start on loopback: what huggingface_hub does with it."""

import json
import subprocess
import sys

from hub import Hub

from hf_qie.data.provenance import checkpoint_compat
from hf_qie.models.base import read_family

CODE = """
import json
from huggingface_hub import HfApi, snapshot_download
from hf_qie.data.provenance import checkpoint_compat
from hf_qie.models.base import read_family
family = read_family("org/tiny")
compat = checkpoint_compat("org/tiny", revision=None, family=family)
print(json.dumps([family.pipeline, compat, HfApi().model_info("org/tiny").private, HfApi().whoami()["name"]]))
"""


def test_a_checkpoint_is_the_same_from_the_hub_as_from_its_folder(loopback_hub: Hub, tiny, tmp_path):
    loopback_hub.upload("org/tiny", tiny())
    environment = loopback_hub.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pipeline, compat, private, name = json.loads(done.stdout)
    family = read_family(str(tiny()))
    assert compat == checkpoint_compat(str(tiny()), revision=None, family=family)
    assert (pipeline, private, name) == (family.pipeline, False, "someone")
