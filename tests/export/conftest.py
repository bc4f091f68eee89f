import os

import pytest

from scir.export.folders import export_adapter, export_dataset, export_merged

from exported import NODE
from helpers import ROOT


@pytest.fixture(scope="session")
def shared(tiny_run, tmp_path_factory):
    "What a run's last model is exported to."
    out, before = tmp_path_factory.mktemp("shared"), os.getcwd()
    os.chdir(ROOT)
    try:
        return {
            to: (out / to, make(str(tiny_run / NODE), out / to))
            for to, make in (("adapter", export_adapter), ("merged", export_merged), ("dataset", export_dataset))
        }
    finally:
        os.chdir(before)
