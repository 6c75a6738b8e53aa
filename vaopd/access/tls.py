"""Says when a server's certificate ends, with the standard library alone: by a handshake with itself, in memory."""

from __future__ import annotations

import logging
import ssl
import time
from pathlib import Path

from vaopd.errors import ConfigError
from vaopd.files.plain import read_plain_bytes
from vaopd.files.secret import read_secret

log = logging.getLogger(__name__)

SAY_EVERY_S = 3600.0
SOON_S = 7 * 24 * 3600.0
_NOT_YET, _EXPIRED = 9, 10  # X509_V_ERR_*


def read_expiry(cert: Path, key: Path, *, section: str) -> float:
    """Returns when a certificate expires, in seconds since the epoch; infinity where that can't be known.

    Raises ConfigError for one that has expired or isn't valid yet, and for a key that everyone may read; ssl.SSLError
    and OSError for unusable files.
    """
    for file in (cert, key):
        read_plain_bytes(file)  # ssl would wait for a pipe
    expires = _find_end(cert, key, section=section)
    read_secret(key, what=f"[{section}.tls] key")
    return expires


def _find_end(cert: Path, key: Path, *, section: str) -> float:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key, password="")  # an encrypted key would be asked for on the terminal
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is the root here
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True))
    try:
        for end in ends * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_EXPIRED, _NOT_YET):
            raise ConfigError(
                f"[{section}.tls] cert = {str(cert)!r}: {error.verify_message}; renew it, and check this host's clock"
            ) from None
        return float("inf")
    except ssl.SSLError:
        return float("inf")
    found = ends[0].getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(found["notAfter"]))) if "notAfter" in found else float("inf")


class ExpiryWatch:
    """Says that a certificate in use expires soon or has expired, at most every `SAY_EVERY_S`."""

    def __init__(self, expires: float, *, section: str) -> None:
        self.expires = expires
        self._section = section
        self._said = float("-inf")
        self._over = False

    def look(self) -> None:
        """Logs what is wrong now."""
        left_s = self.expires - time.time()
        over = left_s <= 0
        if left_s > SOON_S or (time.monotonic() - self._said < SAY_EVERY_S and over == self._over):
            return
        self._said, self._over = time.monotonic(), over
        if not over:
            log.warning("the certificate of [%s.tls] expires in %.1f days; renew it", self._section, left_s / 86_400)
        else:
            log.error("the certificate of [%s.tls] has expired: clients refuse it; renew it", self._section)
