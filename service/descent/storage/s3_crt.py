"""Transfers by AWS's native client (`pip install awscrt`), which moves parts without Python's lock.

boto3 can choose the native client by itself. It then always uses TLS, keeps the endpoint of the
process's first transfer for all later ones, and works in one process of a machine only. The class
here gives the native client the endpoint of our boto3 client instead.
"""

from typing import Any
from urllib.parse import urlsplit

from boto3.session import Session


class Native:
    """The native client for the server of one boto3 client; `transfers` is like boto3's transfer manager."""

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
        """A context manager; when its block ends, every upload and download has finished or failed."""
        return self._manager(self._native, self._serializer, config=config)
