"""The first part of a connection: version, and who may see the screen.

Source: RFC 6143, 7.1 "Handshake Messages", 7.2.2 "VNC Authentication"; the RFB protocol's community
description, "VeNCrypt".
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import ssl
import struct
from dataclasses import dataclass
from enum import IntEnum

from vmonty.vmm.display.vnc.wire import ProtocolError, Stream

VERSION_3_3, VERSION_3_7, VERSION_3_8 = (3, 3), (3, 7), (3, 8)
FAILED, PASSED = 1, 0
PASSWORD_LENGTH = 8  # the protocol's key has no more
CHALLENGE = 16
# For so many seconds after a wrong password no other one is looked at.
PENALTY = 1.0


class Security(IntEnum):
    """Security types and VeNCrypt's subtypes."""

    NONE = 1
    VNC = 2
    VENCRYPT = 19
    X509_NONE = 260
    X509_VNC = 261


@dataclass(frozen=True)
class Access:
    """*password*, of which eight bytes count, None for nobody asked; *tls* None for unencrypted."""

    password: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def security(self) -> Security:
        """The one type that is offered."""
        if self.tls is not None:
            return Security.VENCRYPT
        return Security.NONE if self.password is None else Security.VNC


def response(password: str, challenge: bytes) -> bytes:
    """What a viewer that knows *password* answers: DES under the password, whose bytes' bits are turned round."""
    from Crypto.Cipher import DES

    key = password.encode()[:PASSWORD_LENGTH].ljust(PASSWORD_LENGTH, b"\0")
    cipher = DES.new(bytes(int(f"{byte:08b}"[::-1], 2) for byte in key), DES.MODE_ECB)
    return bytes(cipher.encrypt(challenge))


class Guesses:
    """Looks at the passwords of all connections, one at a time: more connections do not make more guesses."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._next = 0.0  # of the loop's time

    async def right(self, answer: bytes, wanted: bytes) -> bool:
        """Is this one right? A connection that goes away meanwhile does not shorten the PENALTY of a wrong one."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            await asyncio.sleep(max(0.0, self._next - clock()))
            if hmac.compare_digest(answer, wanted):
                return True
            self._next = clock() + PENALTY
            return False


async def handshake(stream: Stream, access: Access, guesses: Guesses) -> None:
    """Agree on version and security, and let the viewer in. Raises ProtocolError when it may not."""
    await stream.send(b"RFB 003.008\n")
    version = _version(await stream.read(12))
    kind = access.security
    if version == VERSION_3_3:
        if kind is Security.VENCRYPT:
            await _refuse(stream, version, "this server needs TLS, which RFB 3.3 does not have")
        await stream.send(struct.pack(">I", kind))
    else:
        await stream.send(bytes((1, kind)))
        if (chosen := (await stream.read(1))[0]) != kind:
            await _fail(stream, version, f"security type {chosen} was not offered")
    secret = kind is Security.VNC
    if kind is Security.VENCRYPT:
        secret = await _vencrypt(stream, access)
    if secret:
        await _authenticate(stream, access, guesses, version)
    elif version == VERSION_3_8 or kind is Security.VENCRYPT:
        await stream.send(struct.pack(">I", PASSED))


def _version(line: bytes) -> tuple[int, int]:
    try:
        if line[:4] != b"RFB " or line[7:8] != b"." or line[11:] != b"\n":
            raise ValueError
        version = int(line[4:7]), int(line[8:11])
    except ValueError:
        raise ProtocolError("this is no RFB viewer") from None
    if version >= VERSION_3_8:
        return VERSION_3_8
    return VERSION_3_7 if version == VERSION_3_7 else VERSION_3_3


async def _refuse(stream: Stream, version: tuple[int, int], reason: str) -> None:
    text = reason.encode()
    nothing = struct.pack(">I" if version == VERSION_3_3 else ">B", 0)
    await stream.farewell(nothing + struct.pack(">I", len(text)) + text)
    raise ProtocolError(reason)


async def _fail(stream: Stream, version: tuple[int, int], reason: str) -> None:
    text = reason.encode()
    told = struct.pack(">I", len(text)) + text if version == VERSION_3_8 else b""
    await stream.farewell(struct.pack(">I", FAILED) + told)
    raise ProtocolError(reason)


async def _vencrypt(stream: Stream, access: Access) -> bool:
    """Encrypt; returns whether a password is asked for."""
    assert access.tls is not None
    await stream.send(b"\0\2")
    if await stream.read(2) != b"\0\2":
        await stream.farewell(b"\1")
        raise ProtocolError("the viewer knows no VeNCrypt 0.2")
    offered = Security.X509_NONE if access.password is None else Security.X509_VNC
    await stream.send(struct.pack(">BBI", 0, 1, offered))
    if struct.unpack(">I", await stream.read(4))[0] != offered:
        await stream.farewell(b"\0")
        raise ProtocolError("the viewer chose a VeNCrypt subtype that was not offered")
    await stream.send(b"\1")
    await stream.start_tls(access.tls)
    return offered is Security.X509_VNC


async def _authenticate(stream: Stream, access: Access, guesses: Guesses, version: tuple[int, int]) -> None:
    assert access.password is not None
    challenge = secrets.token_bytes(CHALLENGE)
    await stream.send(challenge)
    answer = await stream.read(CHALLENGE)
    if not await guesses.right(answer, response(access.password, challenge)):
        await _fail(stream, version, "wrong password")
    await stream.send(struct.pack(">I", PASSED))
