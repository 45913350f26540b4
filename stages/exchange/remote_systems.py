"""File systems of fsspec for the protocols of a remote. Credentials are each library's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from stages.runtime.errors import UsageProblem

PACKAGES = {
    "sftp": ("paramiko", "sftp"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "az": ("adlfs", "az"),
    "abfs": ("adlfs", "az"),
    "https+webdav": ("webdav4.fsspec", "webdav"),
    "http+webdav": ("webdav4.fsspec", "webdav"),
}
"""By protocol: the module it needs, and the extra that installs it."""


def system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """A file system, and the folder in it that url names. Raises UsageProblem where a package is missing."""
    protocol = url.partition(":")[0]
    module, extra = PACKAGES.get(protocol, ("fsspec", ""))
    try:
        importlib.import_module(module)
    except ImportError as error:
        mend = f"pip install 'fedcollm[{extra}]'"
        raise UsageProblem(f"{protocol} remotes need the package {module.partition('.')[0]}", mend=mend) from error
    plain = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "sftp":
        return _sftp(url, options)
    if protocol.endswith("+webdav"):
        return _webdav(url.replace("+webdav", "", 1), options)
    from fsspec.core import url_to_fs

    found, top = url_to_fs(url, **options, **plain)
    return found, str(top)


def _sftp(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """As fsspec's, which takes any host's key; here it must be in known_hosts."""
    import paramiko
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHosts(SFTPFileSystem):  # type: ignore[misc]
        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            self.client.load_host_keys(str(hosts)) if hosts.exists() else None
            self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
            self.client.connect(self.host, **self.ssh_kwargs)
            self.ftp = self.client.open_sftp()

    options = dict(options)
    hosts = Path(str(options.pop("known_hosts", "~/.ssh/known_hosts"))).expanduser()
    named = SFTPFileSystem._get_kwargs_from_urls(url)
    named.pop("protocol", None)
    return KnownHosts(**named, **options, skip_instance_cache=True), SFTPFileSystem._strip_protocol(url)


def _webdav(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The user and the password are those in ~/.netrc, if it names the host."""
    import httpx
    from webdav4.fsspec import WebdavFileSystem

    auth = httpx.NetRCAuth() if Path("~/.netrc").expanduser().exists() else None
    return WebdavFileSystem(url, auth=auth, **options, skip_instance_cache=True), ""
