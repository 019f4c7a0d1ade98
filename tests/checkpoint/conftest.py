import pytest
from replies import Server

from vit_convert.checkpoint import fetch as fetching


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(fetching.urllib.request, "urlopen", made)
    monkeypatch.setattr(fetching.time, "sleep", made.pauses.append)
    return made
