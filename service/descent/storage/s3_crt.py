"""Transfers by AWS's native client (`pip install awscrt`), which moves parts without Python's lock.

boto3 would choose it by itself, but then always speaks TLS to wherever the environment pointed
when the process made its first transfer, and in one process of a machine only. Here it goes where
our own client goes.
"""

from typing import Any
from urllib.parse import urlsplit

from boto3.session import Session


class Native:
    """The native client behind one boto3 client; `transfers` is like boto3's transfer manager."""

    def __init__(self, client: Any, session: Session, part_size: int) -> None:
        from s3transfer import crt  # imports awscrt, which need not be installed

        endpoint, region = client.meta.endpoint_url, client.meta.region_name
        credentials = crt.BotocoreCRTCredentialsWrapper(client._get_credentials())
        self._native = crt.create_s3_crt_client(
            region,
            credentials.to_crt_credentials_provider(),
            part_size=part_size,
            use_ssl=urlsplit(endpoint).scheme == "https",
        )
        self._manager = crt.CRTTransferManager
        self._serializer = crt.BotocoreCRTRequestSerializer(
            session._session, {"region_name": region, "endpoint_url": endpoint}
        )

    def transfers(self, config: Any) -> Any:
        """A context manager whose uploads and downloads are over at the end of its block."""
        return self._manager(self._native, self._serializer, config=config)
