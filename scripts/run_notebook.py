#!/usr/bin/env python3
"""Execute the notebook of examples/ and keep its outputs, without what differs between machines."""

from pathlib import Path

import nbclient
import nbformat

path = Path(__file__).parent.parent / "examples/two_mechanisms.ipynb"
notebook = nbformat.read(path, as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
for number, cell in enumerate(notebook.cells):
    cell["id"] = f"cell-{number}"
    cell["metadata"] = {}
notebook.metadata = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
nbformat.write(notebook, path)
print(f"{path}: {path.stat().st_size} bytes")
