"""The frames inside the channel (net/frames.h): strict decoding of what a client sends."""

from .channel import VERSION, ChannelError
from .codec import F32, I8, row_bytes
from .messages import Frame

MAX_ROWS = 65536
MAX_HIDDEN_SIZE = 65536
MAX_TEXT_BYTES = 512
MAX_FRAME_OVERHEAD = 1024  # what a frame needs beyond its tensor
ERROR_CODES = (3, 5, 8, 9, 13)


def max_frame_bytes(max_rows: int, hidden_size: int) -> int:
    return max_rows * row_bytes(F32, hidden_size) + MAX_FRAME_OVERHEAD


def padded_frame_bytes(rows: int, bytes_of_a_row: int, max_rows: int) -> int:
    """As net/frames.h: row counts are rounded up to powers of two."""
    bucket = min(1 << (rows - 1).bit_length(), max_rows) if rows > 0 else 0
    return max(MAX_FRAME_OVERHEAD, 128 + bucket * bytes_of_a_row)


def pad(frame, size: int) -> None:
    """Makes the frame `size` bytes long, unless it is as long already."""
    missing = size - frame.ByteSize()
    if missing < 2:
        return
    # A tag, the contents' length as a varint, the contents.
    contents = missing - 2
    while 1 + -(-max(contents.bit_length(), 1) // 7) + contents > missing:
        contents -= 1
    if 1 + -(-max(contents.bit_length(), 1) // 7) + contents < missing:
        frame.padding.append(b"")  # the size that one field leaves out
        contents -= 1
    frame.padding.append(bytes(contents))


def clean_text(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text[:MAX_TEXT_BYTES])


def _bad(what: str) -> ChannelError:
    return ChannelError("INVALID_ARGUMENT", f"a frame with {what}")


def decode(data: bytes):
    """A Frame of a kind that a client sends, everything in it checked that needs no session."""
    try:
        frame = Frame.FromString(data)
    except Exception:  # protobuf's DecodeError; its implementations differ in the class
        raise ChannelError("INVALID_ARGUMENT", "bytes that are no frame") from None
    if frame.version != VERSION:
        raise ChannelError("UNIMPLEMENTED", f"a frame of protocol version {frame.version}; "
                                            f"this end speaks {VERSION}")
    kind = frame.WhichOneof("kind")
    if kind is None:
        raise _bad("unknown contents")
    if kind == "open":
        _check_open(frame.open)
    elif kind == "step":
        _check_step(frame.step)
    elif kind == "close":
        if frame.close.session == 0:
            raise _bad("no session")
    else:
        raise ChannelError("INVALID_ARGUMENT", "a frame that only a server sends")
    return frame


def _check_open(message) -> None:
    if len(message.model_fingerprint) != 32 or len(message.cloak_commitment) != 32:
        raise _bad("a fingerprint that is not 32 bytes long")
    if not 1 <= message.hidden_size <= MAX_HIDDEN_SIZE:
        raise _bad("an impossible hidden size")


def _check_step(message) -> None:
    if message.session == 0:
        raise _bad("no session")
    if not 1 <= message.rows <= MAX_ROWS:
        raise _bad("an impossible number of rows")
    if message.start_pos > 2**32 - 1 - message.rows:
        raise _bad("an impossible position")
    if message.wanted not in (0, 1, 2):
        raise _bad("an unknown wish for rows")
    if not message.HasField("tensor"):
        raise _bad("no tensor")
    if not F32 <= message.tensor.dtype <= I8:
        raise _bad("an unknown dtype")
    if message.tensor.compression not in (0, 1):
        raise _bad("an unknown compression")


def new_frame(request: int):
    return Frame(version=VERSION, request=request)


def error_frame(request: int, code: int, message: str):
    frame = new_frame(request)
    frame.error.code = code if code in ERROR_CODES else 13
    frame.error.message = clean_text(message)
    return frame
