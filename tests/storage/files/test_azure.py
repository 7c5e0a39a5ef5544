"""A cache in Azure's blob storage, played by Azurite: Microsoft's own emulator, an npm package."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.node_packages import npm_install
from tests.object_store import free_ports

# the account that every Azurite has
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def create_container(address: str, name: str) -> None:
    date, version = formatdate(usegmt=True), "2021-12-02"
    signed = (
        f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    )
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    url = f"{address}/{ACCOUNT}/{name}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=10).close()


@pytest.fixture
def azurite(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which ``az://caches`` is a container of a running Azurite."""
    packages = npm_install(tmp_path, "azurite")
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    command = [packages / ".bin" / "azurite-blob", "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    command += ["--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        for _ in range(60):
            try:
                create_container(address, "caches")
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("Azurite does not answer")
        yield {**os.environ, "AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": address}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_a_cache_on_azure_is_made_verified_listed_and_trained_from(
    azurite: dict[str, str], photo_cache: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    photos, cache = photo_cache.parent / "photos", "az://caches/photos.cache"
    make = ("precompute", "--dataset", f"flickr:{photos}", "--teacher", f"local-dir:{tiny_teacher}", "--cache", cache)
    done = run_command(*make, "--device", "cpu", env=azurite)
    assert done.returncode == 0, done.stderr
    again = run_command(*make, "--device", "cpu", env=azurite)
    assert "already complete" in again.stdout
    assert run_command("verify", cache, env=azurite).returncode == 0
    assert "photos.cache" in run_command("info", "az://caches", env=azurite).stdout
    words = ("--student", "scenes-small", "--out", tmp_path / "run", "--epochs", "1", "--batch-size", "16")
    done = run_command("train", "--cache", cache, *words, "--device", "cpu", env=azurite)
    assert done.returncode == 0, done.stderr
