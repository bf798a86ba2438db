"""Sessions and steps: rows, positions, dtypes and errors, against engine_serve's rows."""

import threading

import numpy as np
from client import ALL, LAST, NONE, Refused, decode, encode
from fixture import close_to

FLAGS, CLIENTS = (), ("client",)
INVALID, NOT_FOUND, PRECONDITION = 3, 5, 9


def refused(code, word, call, *arguments, **more):
    try:
        call(*arguments, **more)
    except Refused as error:
        assert error.code == code and word in error.message, (error.code, error.message)
        assert len(error.message) <= 512 and error.message.isascii()
        return
    raise AssertionError(f"not refused: {word}")


def pieces_of(fixture, total):
    """Row counts that add up to `total`."""
    counts = []
    while sum(counts) < total:
        counts.append(min(int(fixture.random.choice([1, 1, 2, 7, 40])), total - sum(counts)))
    return counts


def case_rows_are_those_of_engine_serve(fixture, server):
    with fixture.reference() as reference:
        ours, theirs = fixture.client(server), fixture.client(reference)
        a, b = ours.open(), theirs.open()
        assert (a.max_context, a.max_rows) == (b.max_context, b.max_rows), (a, b)
        assert a.max_context == fixture.max_context
        at = 0
        for count in pieces_of(fixture, fixture.max_context):
            rows = fixture.rows(count)
            close_to(ours.step(a.session, at, rows), theirs.step(b.session, at, rows))
            at += count
        for client in (ours, theirs):
            client.close()


def case_a_step_cuts_the_cache(fixture, server):
    client = fixture.client(server)
    first, fresh = client.open().session, client.open().session
    rows = fixture.rows(70)
    client.step(first, 0, rows)
    kept = client.step(first, 69, rows[69:])
    # The same step again changes nothing.
    close_to(client.step(first, 69, rows[69:]), kept)
    # Another end from position 5 on: as if the first had never been.
    others = fixture.rows(65)
    close_to(client.step(first, 5, others),
             client.step(fresh, 0, np.concatenate([rows[:5], others]))[5:])
    # What was cut off is gone.
    client.step(first, 3, rows[3:4])
    refused(INVALID, "", client.step, first, 5, rows[:1])
    close_to(client.step(first, 4, rows[4:5]), client.step(fresh, 4, rows[4:5]))
    client.close()


def case_wanted_rows(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    rows = fixture.rows(9)
    everything = client.step(session, 0, rows, ALL)
    close_to(client.step(session, 0, rows, LAST), everything[-1:])
    client.step(session, 0, rows[:8], NONE)
    close_to(client.step(session, 8, rows[8:], ALL), everything[-1:])
    client.close()


def ask_at_once(client, steps):
    """The rows of every answer; all steps (session, start_pos, rows, wanted) are sent before the
    first answer is read, so that they wait behind each other."""
    frames = [client.step_frame(*step) for step in steps]
    for frame in frames:
        client.send(frame)
    answers = [client.receive() for _ in frames]
    for session in {step[0] for step in steps}:
        asked = [frame.request for frame, step in zip(frames, steps) if step[0] == session]
        assert [a.request for a in answers if a.request in asked] == asked, "another order"
    outputs = []
    for frame, (_, start, rows, wanted) in zip(frames, steps):
        answer = next(a for a in answers if a.request == frame.request)
        assert answer.WhichOneof("kind") == "output", answer
        assert answer.output.kv_len == start + len(rows), answer.output.kv_len
        outputs.append(client.output(answer))
        assert len(outputs[-1]) == {NONE: 0, LAST: 1, ALL: len(rows)}[wanted]
    return outputs


def case_a_prompt_in_steps_that_wait_together(fixture, server):
    client = fixture.client(server)
    opened = client.open()
    busy, session, fresh = opened.session, client.open().session, client.open().session
    rows = fixture.rows(min(opened.max_rows, opened.max_context))
    occupied = (busy, 0, rows, NONE)
    whole = client.step(fresh, 0, rows)
    for wanted in (LAST, ALL):
        # Twice what came before: as a client sends a long prompt.
        starts = [0] + [len(rows) >> n for n in (6, 5, 4, 3, 2, 1)]
        ends = [*starts[1:], len(rows)]
        outputs = ask_at_once(client, [occupied] + [
            (session, start, rows[start:end], wanted if end == len(rows) else NONE)
            for start, end in zip(starts, ends)])
        close_to(outputs[-1], whole[-len(outputs[-1]):])
    # One that cuts what those before it have added, and one after which rows are wanted.
    others = fixture.rows(40)
    outputs = ask_at_once(client, [
        occupied, (session, 0, rows[:20], NONE), (session, 20, rows[20:30], NONE),
        (session, 10, others[10:25], NONE), (session, 25, others[25:33], LAST),
        (session, 33, others[33:36], NONE), (session, 36, others[36:], ALL)])
    expected = client.step(fresh, 0, np.concatenate([rows[:10], others[10:]]))
    close_to(outputs[4], expected[32:33])
    close_to(outputs[6], expected[36:])
    client.close()


def case_every_dtype(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    for dtype in ("f32", "f16", "i8"):
        # Values that every format holds exactly as they are sent.
        sent = encode(dtype, 3 * fixture.rows(40))
        rows = decode(dtype, sent, 40, fixture.hidden_size)
        exact = client.step(session, 0, rows)
        found = client.step(session, 0, rows, dtype=dtype, data=sent)
        # Half a step of the format, and the difference of two float32 runs.
        step = {"f32": 0, "f16": np.abs(exact) * 2.0**-11 + 2.0**-25,
                "i8": np.abs(exact).max(axis=1, keepdims=True) / 127 * (0.5 + 127 * 2.0**-11)}
        slack = 1e-4 * np.linalg.norm(exact, axis=1, keepdims=True)
        assert (np.abs(found - exact) <= step[dtype] + slack).all(), dtype
    client.close()


def case_float16_values_beyond_its_range_are_clamped(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    rows = fixture.rows(1) * np.float32(1e4)
    sent = encode("f16", rows)
    close_to(client.step(session, 0, rows, dtype="f16", data=sent),
             client.step(session, 0, decode("f16", sent, 1, fixture.hidden_size)), share=2.0**-10)
    client.close()


def case_compressed_tensors(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    repeated = np.repeat(fixture.rows(1), 40, axis=0)
    plain = client.step(session, 0, repeated)
    close_to(client.step(session, 0, repeated, lz4_block=True), plain)
    # At or below 4,096 bytes nothing compressed is accepted.
    few = repeated[:4096 // (4 * fixture.hidden_size)]
    refused(INVALID, "", client.step, session, 0, few, lz4_block=True)
    for data in (b"", b"\xff" * 100, bytes(40 * 4 * fixture.hidden_size),
                 encode("f32", repeated)[:-4]):
        refused(INVALID, "", client.ask,
                client.step_frame(session, 0, repeated, data=data, lz4_block=True))
    close_to(client.step(session, 0, repeated), plain)
    client.close()


def case_errors_leave_the_session_as_it_was(fixture, server):
    client, stranger = fixture.client(server), fixture.client(server)
    opened = client.open()
    session, context = opened.session, opened.max_context
    rows = fixture.rows(4)
    kept = client.step(session, 0, rows)
    too_many = np.zeros((opened.max_rows + 1, fixture.hidden_size), np.float32)
    not_finite = rows[:1].copy()
    for bad in (np.nan, np.inf, -np.inf):
        not_finite[0, fixture.random.integers(fixture.hidden_size)] = bad
        refused(INVALID, "not finite", client.step, session, 4, not_finite)
    refused(INVALID, str(opened.max_rows), client.step, session, 0, too_many, dtype="i8")
    refused(INVALID, "", client.step, session, 5, rows)
    refused(INVALID, str(context), client.step, session, context - 3, rows)
    refused(INVALID, str(context), client.step, session, 2**32 - 17, rows)
    refused(INVALID, "bytes", client.ask,
            client.step_frame(session, 4, rows, data=encode("f32", rows)[:-1]))
    refused(INVALID, "bytes", client.ask, client.step_frame(session, 4, rows, count=5))
    wrong = session + 1 if session < 2**64 - 1 else 1
    refused(NOT_FOUND, "session", client.step, wrong, 0, rows)
    refused(NOT_FOUND, "session", stranger.step, session, 0, rows[:1])
    close_to(client.step(session, 4, rows[:1])[:1],
             client.step(session, 0, np.concatenate([rows, rows[:1]]))[4:])
    close_to(client.step(session, 0, rows), kept)
    client.send(client.frame(close={"session": wrong}))  # ignored
    client.send(client.frame(close={"session": session}))
    refused(NOT_FOUND, "session", client.step, session, 0, rows)
    client.close()
    stranger.close()


def case_models_that_do_not_belong_together(fixture, server):
    client = fixture.client(server)
    other = bytes(b ^ 1 for b in fixture.body[0])
    refused(PRECONDITION, "model", client.ask, client.open_frame(fingerprint=other))
    refused(PRECONDITION, "cloak", client.ask, client.open_frame(commitment=other))
    refused(PRECONDITION, "hidden size", client.ask, client.open_frame(hidden_size=63))
    client.step(client.open().session, 0, fixture.rows(1))
    client.close()


def case_a_new_connection_starts_anew(fixture, server):
    rows = fixture.rows(12)
    first = fixture.client(server)
    lost = first.open().session
    kept = first.step(lost, 0, rows)
    first.close()
    second = fixture.client(server)
    refused(NOT_FOUND, "session", second.step, lost, 12, rows[:1])
    again = second.open().session
    assert again != lost
    close_to(second.step(again, 0, rows), kept)
    second.close()


def case_padding(fixture, server):
    plain, client = fixture.client(server), fixture.client(server)
    kept = plain.ask(plain.open_frame()).opened
    assert plain.frame_size < 300 and not kept.padded
    refused(PRECONDITION, "model", client.ask, client.open_frame(bytes(32), pad=True))
    assert client.frame_size == 1024, client.frame_size
    opened = client.ask(client.open_frame(pad=True)).opened
    assert client.frame_size == 1024 and opened.padded

    def size(rows, dtype):
        bucket = min(2 ** int(np.ceil(np.log2(rows))), opened.max_rows) if rows else 0
        return max(1024, 128 + bucket * len(encode(dtype, np.zeros((1, fixture.hidden_size)))))

    for i in range(40):
        count = int(fixture.random.integers(1, 100))
        dtype = str(fixture.random.choice(["f32", "f16", "i8"]))
        wanted = int(fixture.random.integers(3))
        back = {NONE: 0, LAST: 1, ALL: count}[wanted]
        rows = fixture.rows(count)
        frame = client.step_frame(opened.session, 0, rows, wanted, dtype)
        # Padding of any shape is ignored.
        frame.padding.extend(fixture.random.bytes(int(n)) for n in fixture.random.integers(
            0, 3000, i % 4))
        answer = client.ask(frame)
        assert client.frame_size == size(back, dtype), (client.frame_size, back, dtype)
        close_to(client.output(answer, dtype), plain.step(kept.session, 0, rows, wanted, dtype))
        assert plain.frame_size < 200 + back * 4 * fixture.hidden_size
        for session, start in ((opened.session, 2**31), (opened.session ^ 1, 0)):
            refused(INVALID if start else NOT_FOUND, "", client.step, session, start, rows,
                    wanted, dtype)
            assert client.frame_size == size(back, dtype), (client.frame_size, back, dtype)
    client.close()
    plain.close()


def case_many_sessions_at_once(fixture, server):
    """Steps that wait are run together; every session gets its own rows."""
    clients, per_client, total = 4, 3, 60
    inputs = {(c, s): (pieces_of(fixture, total), fixture.rows(total))
              for c in range(clients) for s in range(per_client)}
    outputs, failures = {}, []

    def work(c):
        try:
            client = fixture.client(server)
            sessions = [client.open().session for _ in range(per_client)]
            todo = [(s, list(inputs[c, s][0]), 0) for s in range(per_client)]
            while todo:
                frames = []
                for s, counts, at in todo:  # all in flight before the first answer is read
                    rows = inputs[c, s][1][at:at + counts[0]]
                    frames.append((client.step_frame(sessions[s], at, rows), s))
                    client.send(frames[-1][0])
                answers = {answer.request: answer for answer in
                           (client.receive() for _ in frames)}
                for frame, s in frames:
                    answer = answers[frame.request]
                    assert answer.WhichOneof("kind") == "output", answer
                    outputs.setdefault((c, s), []).append(client.output(answer))
                todo = [(s, counts[1:], at + counts[0]) for s, counts, at in todo if counts[1:]]
            client.close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    alone = fixture.client(server)
    for key, (_, rows) in inputs.items():
        session = alone.open().session
        close_to(np.concatenate(outputs[key]), alone.step(session, 0, rows))
        alone.send(alone.frame(close={"session": session}))
    alone.close()
