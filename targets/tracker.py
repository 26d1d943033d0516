"""Questions to TVM's RPC tracker; tvm.rpc's own client waits for the answers without end."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from tvm.rpc import base as protocol

from tvm_lowrank.errors import UserError

TIMEOUT = 5.0  # seconds
DEFAULT_PORT = 9190


def ask(host: str, port: int, code: int, *arguments: object, timeout: float = TIMEOUT) -> Any:
    """The tracker's answer to one question, ``code`` of `tvm.rpc.base.TrackerCode`.

    Raises
    ------
    OSError
        If there is no tracker, or it does not answer in time, or it refuses.
    """
    with socket.create_connection((host, port), timeout=timeout) as connection:
        magic = struct.pack("<i", protocol.RPC_TRACKER_MAGIC)
        connection.sendall(magic)
        if protocol.recvall(connection, len(magic)) != magic:
            raise ConnectionError(f"{host}:{port} is no RPC tracker")
        protocol.sendjson(connection, [code, *arguments])
        answered, answer = protocol.recvjson(connection)
        if answered != protocol.TrackerCode.SUCCESS:
            raise ConnectionError(f"the tracker {host}:{port} refused: {answer}")
        return answer


def summary(host: str, port: int) -> dict[str, Any]:
    """``queue_info``: key to the numbers of free boards and of waiting clients; ``server_info``: all boards."""
    answer: dict[str, Any] = ask(host, port, protocol.TrackerCode.SUMMARY)
    return answer


def request(host: str, port: int, key: str, *, timeout: float = TIMEOUT) -> tuple[str, int, str]:
    """Take a free board: where its server is, and the key to greet it with, to be used within some seconds."""
    board, board_port, match_key = ask(host, port, protocol.TrackerCode.REQUEST, key, "", 1, timeout=timeout)
    return board, int(board_port), match_key


def tracker_address(text: str | None) -> tuple[str, int] | None:
    """HOST:PORT as its parts; without it, TVM's ``TVM_TRACKER_HOST`` and ``TVM_TRACKER_PORT``, or None.

    Raises
    ------
    UserError
        If it is no address.
    """
    if text is None:
        host = os.environ.get("TVM_TRACKER_HOST")
        if not host:
            return None
        text = f"{host}:{os.environ.get('TVM_TRACKER_PORT') or DEFAULT_PORT}"
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal() or not 0 < int(number) < 2**16:
        raise UserError(f"RPC tracker {text!r} is not HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
    return name, int(number)
