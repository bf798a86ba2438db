"""Handshake, keys, records and frames: what ends a stream, and with which status."""

import os

from client import Client, Ended, Stream, new_key, pb
from fixture import close_to
from grpc import StatusCode

FLAGS, CLIENTS = (), ("client", "other")


def ended_by(client, *envelopes):
    for envelope in envelopes:
        client.write(envelope)
    return client.ending()


def expect(found, wanted):
    assert found == wanted, f"{found} instead of {wanted}"


def talk(fixture, server):
    """The server still serves."""
    client = fixture.client(server)
    session = client.open().session
    client.step(session, 0, fixture.rows(2))
    client.close()


def case_both_ciphers(fixture, server):
    for cipher in (1, 2):
        client = fixture.client(server, cipher=cipher)
        client.step(client.open().session, 0, fixture.rows(3))
        client.close()


def case_unknown_cipher_or_version_gets_a_refusal(fixture, server):
    for version, cipher in ((1, 3), (1, 0), (2, 2)):
        stream = Stream(server.address)
        stream.write(pb.Envelope(hello=pb.Hello(version=version, cipher=cipher), data=bytes(96)))
        refusal = stream.read().refusal
        assert list(refusal.versions) == [1] and 2 in refusal.ciphers, refusal
        expect(stream.ending(), StatusCode.FAILED_PRECONDITION)


def case_another_server_key(fixture, server):
    try:
        Client(server.address, fixture.secret("client"), new_key()[1], fixture.body)
        raise AssertionError("the handshake succeeded")
    except Ended as end:
        expect(end.code, StatusCode.UNAUTHENTICATED)


def case_a_client_that_is_not_on_the_list(fixture, server):
    try:
        fixture.client(server, "stranger")
        raise AssertionError("the handshake succeeded")
    except Ended as end:
        expect(end.code, StatusCode.PERMISSION_DENIED)


def case_first_messages_that_are_none(fixture, server):
    maker = Client.__new__(Client)
    good = maker.first_message(fixture.secret("client"), fixture.public("server"), 2)
    long = maker.first_message(fixture.secret("client"), fixture.public("server"), 2, b"early")
    hello = pb.Hello(version=1, cipher=2)
    changed = bytearray(good.data)
    changed[40] ^= 1
    # Ephemeral keys of low order: everybody knows their shared secrets.
    low = [bytes(32), bytes([1]) + bytes(31)]
    for data in (good.data[:95], b"", long.data, bytes(changed), os.urandom(96),
                 *(point + good.data[32:] for point in low)):
        expect(ended_by(Stream(server.address), pb.Envelope(hello=hello, data=data)),
               StatusCode.UNAUTHENTICATED)
    # The cipher is part of the prologue: a changed one ends the handshake.
    other = pb.Envelope(hello=pb.Hello(version=1, cipher=1), data=good.data)
    expect(ended_by(Stream(server.address), other), StatusCode.UNAUTHENTICATED)
    expect(ended_by(Stream(server.address), pb.Envelope(data=good.data)),
           StatusCode.INVALID_ARGUMENT)
    talk(fixture, server)


def case_a_replayed_first_message_opens_nothing(fixture, server):
    original = fixture.client(server)
    replay = Stream(server.address)
    replay.write(original.hello)
    assert len(replay.read().data) == 48
    # The replayer does not have the key for what must follow.
    record = original.records(original.open_frame())[0]
    expect(ended_by(replay, pb.Envelope(data=record)), StatusCode.DATA_LOSS)
    original.close()
    talk(fixture, server)


def case_silence(fixture, server):
    expect(Stream(server.address).ending(), StatusCode.DEADLINE_EXCEEDED)


def case_records_that_do_not_follow_the_protocol(fixture, server):
    def data(make):
        client = fixture.client(server)
        return ended_by(client, pb.Envelope(data=make(client)))

    def open_record(client):
        return client.records(client.open_frame())[0]

    expect(data(lambda c: 2 * open_record(c)), StatusCode.DATA_LOSS)
    expect(data(lambda c: b""), StatusCode.DATA_LOSS)
    expect(data(lambda c: open_record(c)[:-1]), StatusCode.DATA_LOSS)
    expect(data(lambda c: open_record(c) + b"\0"), StatusCode.DATA_LOSS)
    expect(data(lambda c: b"\0\x10" + bytes(16)), StatusCode.DATA_LOSS)
    expect(data(lambda c: open_record(c)[:20] + b"x" + open_record(c)[21:]), StatusCode.DATA_LOSS)
    expect(data(lambda c: c.record(b"")), StatusCode.DATA_LOSS)
    expect(data(lambda c: c.record(b"\4" + c.open_frame().SerializeToString())),
           StatusCode.DATA_LOSS)
    expect(data(lambda c: c.record(b"\1" + c.open_frame().SerializeToString())),
           StatusCode.DATA_LOSS)
    expect(data(lambda c: c.record(b"\3" + c.open_frame().SerializeToString())),
           StatusCode.DATA_LOSS)

    def lost(client):  # the first record never arrives
        client.records(client.open_frame())
        return open_record(client)
    expect(data(lost), StatusCode.DATA_LOSS)
    # A second hello on the stream.
    client = fixture.client(server)
    expect(ended_by(client, client.hello), StatusCode.INVALID_ARGUMENT)
    talk(fixture, server)


def case_keys_are_replaced(fixture, server):
    """The client's with every record, with none and at random; the server's as it likes."""
    for cipher in (1, 2):
        kept = fixture.client(server, cipher=cipher)
        client = fixture.client(server, cipher=cipher)
        sessions = kept.open().session, client.open().session
        for i in range(60):
            chance = (i < 20) + 0.5 * (i >= 40)
            client.replace_key = lambda: bool(fixture.random.random() < chance)
            # In f32 a step of 300 rows is two records.
            rows = fixture.rows(min(300, fixture.max_context) if i % 20 == 0 else 1)
            close_to(client.step(sessions[1], 0, rows), kept.step(sessions[0], 0, rows))
        if fixture.replaces_keys:
            assert client.keys_seen >= 3 and kept.keys_seen >= 3
        client.replace_key = lambda: True
        last = client.records(client.step_frame(sessions[1], 0, fixture.rows(1)))[0]
        client.write(pb.Envelope(data=last))
        client.receive()
        expect(ended_by(client, pb.Envelope(data=last)), StatusCode.DATA_LOSS)  # again
        kept.close()


def case_frames_that_are_malformed(fixture, server):
    rows = fixture.rows(1)

    def status(make, opened=True):
        client = fixture.client(server)
        session = client.open().session if opened else 1
        frame = make(client, session)
        client.send(frame)
        return client.ending()

    def changed(**fields):
        def make(client, session):
            frame = client.step_frame(session, 0, rows)
            for name, value in fields.items():
                target, _, field = name.rpartition("__")
                setattr(frame.step.tensor if target else frame.step, field, value)
            return frame
        return make

    def no_tensor(client, session):
        frame = client.step_frame(session, 0, rows)
        frame.step.ClearField("tensor")
        return frame

    def version(client, session):
        frame = client.open_frame()
        frame.version = 2
        return frame

    bad = [lambda c, s: b"\xff\xff\xff", lambda c, s: c.frame(), no_tensor,
           lambda c, s: c.frame(error=pb.Error(code=13, message="x")),
           lambda c, s: c.frame(opened=pb.Opened(session=1)),
           lambda c, s: c.frame(output=pb.Output()),
           lambda c, s: c.frame(close=pb.Close()),
           lambda c, s: c.open_frame(fingerprint=bytes(31)),
           lambda c, s: c.open_frame(commitment=bytes(33)),
           lambda c, s: c.open_frame(hidden_size=0),
           lambda c, s: c.open_frame(hidden_size=65537),
           changed(session=0), changed(rows=0), changed(rows=65537), changed(wanted=3),
           changed(start_pos=2**32 - 1), changed(tensor__dtype=0), changed(tensor__dtype=4),
           changed(tensor__compression=2)]
    for i, make in enumerate(bad):
        found = status(make)
        assert found == StatusCode.INVALID_ARGUMENT, f"frame {i}: {found}"
    expect(status(version), StatusCode.UNIMPLEMENTED)
    talk(fixture, server)


def case_frames_and_envelopes_beyond_the_limits(fixture, server):
    client = fixture.client(server)
    client.send(bytes(1025))
    expect(client.ending(), StatusCode.RESOURCE_EXHAUSTED)

    client = fixture.client(server)
    opened = client.open()
    client.send(bytes(4 * opened.max_rows * fixture.hidden_size + 1025))
    expect(client.ending(), StatusCode.RESOURCE_EXHAUSTED)

    client = fixture.client(server)
    expect(ended_by(client, pb.Envelope(data=bytes(512 * 1024 + 1))),
           StatusCode.RESOURCE_EXHAUSTED)

    # The largest frame that is allowed, in one envelope and in many.
    client = fixture.client(server)
    opened = client.open()
    rows = fixture.rows(opened.max_rows)
    frame = client.step_frame(opened.session, 0, rows)
    # The context is shorter: an error of the request, not of the stream.
    records = client.records(frame)
    assert len(records) > 1 and opened.max_rows > opened.max_context
    client.write(pb.Envelope(data=b"".join(records)))
    expect(client.receive().error.code, 3)
    client.step(opened.session, 0, fixture.rows(1))
    client.close()


def case_requests_in_flight(fixture, server):
    client = fixture.client(server)
    frames = [client.open_frame() for _ in range(40)]
    for frame in frames:
        client.send(frame)
    client.done_writing()
    for frame in frames:
        answer = client.receive()
        assert answer.request == frame.request and answer.WhichOneof("kind") in ("opened", "error")
    expect(client.ending(), StatusCode.OK)

    client = fixture.client(server)
    session = client.open().session
    steps = [client.step_frame(session, 0, fixture.rows(1)) for _ in range(17)]
    records = [client.records(step)[0] for step in steps]
    client.write(pb.Envelope(data=b"".join(records[:16])))
    for step in steps[:16]:
        answer = client.receive()
        assert answer.request == step.request and answer.WhichOneof("kind") == "output", answer
    again = [client.records(step)[0] for step in steps]
    expect(ended_by(client, pb.Envelope(data=b"".join(records[16:] + again[:16]))),
           StatusCode.RESOURCE_EXHAUSTED)

    # Frames count, whether or not they are answered.
    client = fixture.client(server)
    closes = [client.records(client.frame(close=pb.Close(session=1)))[0] for _ in range(33)]
    client.write(pb.Envelope(data=b"".join(closes[:16])))
    expect(ended_by(client, pb.Envelope(data=b"".join(closes[16:]))),
           StatusCode.RESOURCE_EXHAUSTED)


def case_half_close_after_a_request(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    client.send(client.step_frame(session, 0, fixture.rows(4)))
    client.done_writing()
    assert len(client.output(client.receive())) == 4
    expect(client.ending(), StatusCode.OK)
