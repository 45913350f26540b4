"""torch's compiler is not imported until somebody asks for more of it than to leave functions alone."""

from __future__ import annotations

import subprocess
import sys

from builders import ROOT

PRINT = "print([name in sys.modules for name in ('torch._dynamo', 'sympy')])"
TRAINED = """parameter = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([parameter], lr=0.5)
parameter.sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(round(float(parameter), 2))
"""


def printed(code: str) -> list[str]:
    """What a fresh Python prints, a line each."""
    code = f"import sys, torch\nfrom stages.runtime import compiler, imports\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_optimiser_steps_without_it_and_to_the_same_place() -> None:
    inside = "".join(f"    {line}\n" for line in TRAINED.splitlines())
    assert printed(f"with compiler.unloaded():\n{inside}{PRINT}\n{TRAINED}{PRINT}") == [
        "0.5",
        "[False, False]",
        "0.5",
        "[True, True]",
    ]


def test_transformers_peft_and_a_model_of_theirs_load_without_it_and_without_algebra() -> None:
    code = "imports.spare()\nimport transformers.models.llama.modeling_llama, transformers.trainer, peft\n"
    assert printed(code + PRINT) == ["[False, False]"]


def test_a_process_among_several_has_all_of_transformers() -> None:
    code = "import transformers.utils\nprint(transformers.utils.is_torch_distributed_available())"
    assert printed(f"imports.spare()\n{code}") == ["False"]
    assert printed(f"imports.spare(is_alone=False)\n{code}") == ["True"]


def test_whoever_compiles_meanwhile_has_the_compiler() -> None:
    code = """with compiler.unloaded():
    made = torch.compile(lambda x: x + 1, backend="eager")
    print(made(torch.ones(1)).item())
    print(torch._dynamo.__file__ is not None, type(sys.modules["torch._dynamo"]).__name__)
print(torch._dynamo.is_compiling())
"""
    assert printed(code) == ["2.0", "True module", "False"]


def test_a_module_of_it_can_be_imported_meanwhile() -> None:
    code = "with compiler.unloaded():\n    import torch._dynamo.config as own\n    print(own.cache_size_limit > 0)"
    assert printed(code) == ["True"]


def test_a_mask_that_needs_its_patch_has_it() -> None:
    code = """with compiler.unloaded():
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
table = torch.arange(3)
def read(place):
    return table[place]
with TransformGetItemToIndex():
    print(torch.vmap(read)(torch.tensor([2, 0])).tolist())
"""
    assert printed(code) == ["[2, 0]"]


def test_it_changes_nothing_once_the_compiler_is_there() -> None:
    code = """import torch._dynamo
before = torch._dynamo
with compiler.unloaded():
    print(sys.modules["torch._dynamo"] is before)
print(sys.modules["torch._dynamo"] is before)
"""
    assert printed(code) == ["True", "True"]
