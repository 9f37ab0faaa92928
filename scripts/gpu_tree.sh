#!/usr/bin/env bash
# gpu_tree.sh DEST: put this checkout on PYTHONPATH without pip, for a host that reaches no package index.
#
# Lays a tree of links in DEST with the package's installed shape, compiles the C kernels for the Python that PYTHON
# names (default python3), and writes the metadata by which vLLM's plugin loader finds the connector. A sitecustomize
# sees to it that the tree is imported even where the checkout, whose pdtransport lacks kernels and launch, is the current
# folder. Then: export PYTHONPATH=DEST:...
# Run it again after adding or removing a module; edited modules need nothing, since DEST only links to them.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: gpu_tree.sh DEST" >&2; exit 2; }
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
dest=$(cd "$1" && pwd)
[ "$dest" != "$root" ] || { echo "gpu_tree.sh: DEST must not be the checkout itself" >&2; exit 2; }

rm -rf "$dest/pdtransport" "$dest"/pdtransport-*.dist-info
mkdir "$dest/pdtransport" "$dest/pdtransport/kernels"
ln -s "$root"/pdtransport/* "$root/launch" "$dest/pdtransport/"
# kernels is a folder of links, not a link: the compiled extension belongs to one Python and stays out of the checkout
for file in "$root"/kernels/*; do
  case $file in *.so | */__pycache__) ;; *) ln -s "$file" "$dest/pdtransport/kernels/" ;; esac
done

"$python" - "$root" "$dest" <<'PY'
import pathlib, re, subprocess, sys, sysconfig

root, dest = map(pathlib.Path, sys.argv[1:])
text = (root / "pyproject.toml").read_text(encoding="utf-8")
version = re.search(r'^version = "(.+)"$', text, re.M).group(1)
info = dest / f"pdtransport-{version}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pdtransport\nVersion: {version}\n", encoding="utf-8")
(dest / "sitecustomize.py").write_text(
    f"""import importlib.util, sys

class Tree:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pdtransport":
            found = {str(dest / "pdtransport")!r}
            return importlib.util.spec_from_file_location(
                name, found + "/__init__.py", submodule_search_locations=[found])
        return None

sys.meta_path.insert(0, Tree)
""", encoding="utf-8")
points = []
plugins = "vllm.general_plugins"
for table, name in (("project.scripts", "console_scripts"), (f'project.entry-points."{plugins}"', plugins)):
    body = text.split(f"[{table}]\n", 1)[1].split("\n[", 1)[0]
    points += [f"[{name}]", *(f"{key} = {value}" for key, value in re.findall(r'^(\S+) = "(.+)"$', body, re.M)), ""]
(info / "entry_points.txt").write_text("\n".join(points), encoding="utf-8")

target = dest / "pdtransport" / "kernels" / ("_pages" + sysconfig.get_config_var("EXT_SUFFIX"))
setup = (root / "setup.py").read_text(encoding="utf-8")
flags = re.findall(r'"(-[^"]+)"', setup.split("extra_compile_args", 1)[1].split("]", 1)[0])
sources = ["-I" + sysconfig.get_paths()["include"], *map(str, sorted((root / "kernels/csrc").glob("*.c"))), "-o", str(target)]
for compiler in ((sysconfig.get_config_var("CC") or "cc").split()[0], "cc", "gcc", "clang"):
    try:
        done = subprocess.run([compiler, "-shared", "-fPIC", *flags, *sources], capture_output=True, text=True)
    except FileNotFoundError:
        continue
    if done.returncode == 0:
        print(f"gpu_tree: C kernels built with {compiler}")
        break
    print(f"gpu_tree: {compiler} failed: {(done.stderr.strip() or '?').splitlines()[0]}", file=sys.stderr)
else:
    print("gpu_tree: no C compiler worked: numpy does the CPU kernels' work", file=sys.stderr)
PY
echo "gpu_tree: export PYTHONPATH=$dest\${PYTHONPATH:+:\$PYTHONPATH}"
