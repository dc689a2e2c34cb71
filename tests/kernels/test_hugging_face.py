"""Our package `kernels` beside the one that Hugging Face publishes under the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the public implementations are in the test extra")
ROOT = Path(__file__).parents[2]
# What transformers 5.23 imports from the other package.
NAMES = [
    "CUDAProperties", "Device", "KernelizeFallback", "LayerRepository", "LocalLayerRepository", "Mode",
    "ROCMProperties", "get_kernel", "kernelize", "register_kernel_mapping", "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub", "use_kernel_mapping", "use_kernelized_func",
]  # fmt: skip
PROGRAM = """
import torch
from transformers.utils.import_utils import is_kernels_available

import kernels
from kernels.hugging_face import import_transformers

assert is_kernels_available(), "transformers does not see the stand-in: the test proves nothing"
transformers = import_transformers()
assert not is_kernels_available()
common = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32)
linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
for options in (
    dict(model_type="qwen3_next", mlp_only_layers=[0], **heads, **linear),
    dict(model_type="mamba2", num_heads=2, head_dim=16, expand=2, state_size=4, n_groups=1),
    dict(model_type="gpt_oss", num_local_experts=2, num_experts_per_tok=1, **heads),
):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**common, **options))
    assert model(torch.arange(5)[None], use_cache=False).logits.shape == (1, 5, 32)
y, _ = kernels.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), activation=None)
assert y[0, :, 0].tolist() == [1, 2, 2]
print(kernels.__file__)
"""


@pytest.mark.thorough
def test_models_of_transformers_and_our_kernels_work_where_the_other_package_is_installed(tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("".join(f"def {name}(*args): ...\n" for name in NAMES))
    about = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(ROOT / "kernels/__init__.py")
