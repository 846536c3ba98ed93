"""The last step of an image build: leaves out what no stage runs, compiles what stages import, lists what is inside."""

import importlib.metadata
import json
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
UNUSED = (
    *("torch/test", "torch/include", "torch/share", "torch/bin/protoc*", "torch/bin/*Test", "torch/bin/test*"),
    *("pyarrow/include", "pyarrow/src", "pyarrow/tests", "pyarrow/libarrow_flight*", "pyarrow/**/*.p[xy]*[xid]"),
    *("pyarrow/_flight*", "pyarrow/libarrow_python_flight*", "numpy/_core/include"),
    *("**/*.a", "**/*.pyi", "datatrove/**/tests", "matplotlib/tests", "mpl_toolkits/**/tests", "networkx/**/tests"),
    *("numpy/**/tests", "scipy/**/tests", "sklearn/**/tests", "sympy/**/tests", "Crypto/SelfTest"),
    # Block lists of web addresses, a transfer protocol of the Hugging Face hub, fonts in PDF files.
    *("datatrove/assets", "hf_xet*", "fontTools", "fonttools-*"),
    # A store that K2 reaches by its own client, the same library under three names.
    *("pyarrow/_s3fs*", "pyarrow/libarrow_s3*", "pyarrow/libarrow_python.so", "pyarrow/libarrow_python.so.*.*"),
)
"""What no stage reads, in either image."""
UNUSED_ON_CPU = ("triton", "triton-*")
"""Kernels are for accelerators; without a C compiler Triton cannot launch any."""
MODELS = {"auto", "bert", "deepseek_v3", "llama"}
"""Of transformers, K2 uses the reader of GGUF files, with everybody's tokenizers; its exports are as these models."""
UNUSED_IN_MODELS = ("modeling_*", "modular_*", "*processing_*", "feature_extraction_*", "convert_*")
IMPORTED = """
import importlib, sys
from k2.execution.registry import STAGES
later = ["kfp.dsl.executor_main", "transformers.integrations.gguf.gguf_tokenizer_mapping"]
for name in ["k2.cli", "k2.execution.component", *(spec.module for spec in STAGES.values()), *later]:
    importlib.import_module(name)
print(*sorted({str(m.__file__) for m in sys.modules.values() if str(getattr(m, "__file__", "")).endswith(".py")}))
"""


def main(kind: str) -> None:
    """Prune, strip where binutils are, compile, and write `sbom.json` beside the environment."""
    for pattern in (*UNUSED, *(UNUSED_ON_CPU if kind == "cpu" else ())):
        for path in sorted(SITE.glob(pattern)):
            remove(path)
    for pattern in UNUSED_IN_MODELS:
        for path in sorted((SITE / "transformers" / "models").glob(f"*/{pattern}")):
            if path.parent.name not in MODELS:
                remove(path)
    if kind == "cpu" and shutil.which("strip"):
        strip()
    # Quietly, and without times in the files: the same sources make the same layer.
    for source in subprocess.check_output([sys.executable, "-Bc", IMPORTED], text=True, cwd=sys.prefix).split():
        if Path(source).is_relative_to(SITE):
            py_compile.compile(source, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (Path(sys.prefix) / "sbom.json").write_text(json.dumps(sbom(), indent=1, sort_keys=True) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def strip() -> None:
    """Take the symbols out of native libraries; not of those in `*.libs`, whose layout was patched after linking."""
    for library in sorted(path for path in SITE.rglob("*.so*") if path.is_file() and not path.is_symlink()):
        if not any(parent.suffix == ".libs" for parent in library.parents):
            subprocess.run(["strip", "--strip-unneeded", library], check=True)


def sbom() -> dict[str, object]:
    """The installed distributions as CycloneDX 1.6."""
    found = {each.metadata["Name"].lower().replace("_", "-"): each for each in importlib.metadata.distributions()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {
                "type": "library",
                "name": name,
                "version": each.version,
                "purl": f"pkg:pypi/{name}@{each.version}",
                "licenses": [{"license": {"name": each.metadata["License-Expression"] or "see the package"}}],
            }
            for name, each in sorted(found.items())
        ],
    }


if __name__ == "__main__":
    main(sys.argv[1])
