"""The last step of an image build: leaves out what no stage runs, compiles what stages import, lists what is inside."""

import compileall
import importlib.metadata
import json
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
UNUSED = (
    *("torch/test", "torch/include", "torch/share", "torch/bin/protoc*", "torch/bin/*Test", "torch/bin/test*"),
    *("pyarrow/include", "pyarrow/src", "pyarrow/tests", "pyarrow/libarrow_flight*"),
    *("pyarrow/_flight*", "pyarrow/libarrow_python_flight*", "numpy/_core/include"),
    *("**/*.a", "datatrove/**/tests", "matplotlib/tests", "mpl_toolkits/**/tests", "networkx/**/tests"),
    *("numpy/**/tests", "scipy/**/tests", "sklearn/**/tests", "sympy/**/tests"),
)
MODELS = re.compile(r"transformers/models/(?!auto|bert|deepseek_v3|llama)")
COMPILED = ("k2", "components", "pipelines", "kfp", "torch", "transformers", "numpy", "pydantic", "urllib3", "minio")


def main() -> None:
    """Prune, strip where binutils are, compile, and write `sbom.json` beside the environment."""
    for pattern in UNUSED:
        for path in sorted(SITE.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if shutil.which("strip"):
        for library in sorted((SITE / "torch" / "lib").glob("libtorch*.so")):
            subprocess.run(["strip", "--strip-unneeded", library], check=True)
    for package in COMPILED:
        # Quietly, and without times in the files: the same sources make the same layer.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(SITE / package, quiet=1, rx=MODELS, invalidation_mode=mode)
    (Path(sys.prefix) / "sbom.json").write_text(json.dumps(sbom(), indent=1, sort_keys=True) + "\n")


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
    main()
