"""What hostile and broken clients get from the gRPC front, and that the next good request is answered."""

import contextlib
import os
import socket
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecard.errors import UsageError
from onecard.server.grpc_limits import GrpcListen
from tests.unit.server.grpc_faces import echo_face, serving

client = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
grpc = pytest.importorskip("grpc")
pytestmark = pytest.mark.timeout(300)
INFER = "/inference.GRPCInferenceService/ModelInfer"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING = 0, 1, 3, 4, 6


def a_request(**changes):
    message = client.service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[np.ones(3, "f4").tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    for name, value in changes.items():
        setattr(message, name, value)
    return message.SerializeToString()


@contextlib.contextmanager
def calling(running, options=()):
    with grpc.insecure_channel(running.url, [("grpc.use_local_subchannel_pool", 1), *options]) as channel:
        yield channel.unary_unary(INFER)


def is_well(running):
    with calling(running) as call:
        return call(a_request(), timeout=60).endswith(np.full(3, 2, "f4").tobytes())


def code_of(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as refused:
        call(*arguments, timeout=60, **options)
    return refused.value.code().name, refused.value.details()


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path=INFER):
    """HPACK, literals without indexing."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers",
              "content-type": "application/grpc"}  # fmt: skip
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


def talk(running, data, wait_s=30.0, wanted=None):
    """What the server sends back until it closes the connection, the time is over, or it has sent what is wanted."""
    with socket.create_connection(("127.0.0.1", running.server.port), wait_s) as peer:
        found = b""
        with contextlib.suppress(OSError):
            peer.sendall(data)
            while piece := peer.recv(65536):
                found += piece
                if wanted is not None and wanted in found:
                    break
        return found


def test_a_message_that_is_too_large():
    with serving(echo_face(), max_message_bytes=10_000) as running, calling(running) as call:
        code, _ = code_of(call, a_request() + b"\x3a\x90\x4e" + bytes(10_000))
        assert code == "RESOURCE_EXHAUSTED"
        assert is_well(running)


@pytest.mark.parametrize("algorithm", ["Gzip", "Deflate"])
def test_a_message_that_is_too_large_once_it_is_decompressed(algorithm):
    with serving(echo_face(), max_message_bytes=100_000) as running, calling(running) as call:
        bomb = a_request() + b"\x3a\x80\x80\x80\x20" + bytes(64 << 20)
        code, _ = code_of(call, bomb, compression=getattr(grpc.Compression, algorithm))
        assert code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
        assert is_well(running)


def test_a_head_that_is_too_large_and_more_than_may_be_held():
    with serving(echo_face(), max_head_bytes=1000, max_held_bytes=5000) as running, calling(running) as call:
        code, text = code_of(call, a_request(id="i", model_version="1" * 2000))
        assert (code, "Send large tensors" in text) == ("INVALID_ARGUMENT", True)
        code, text = code_of(call, a_request() + b"\x3a\x90\x4e" + bytes(10_000))
        assert code == "INVALID_ARGUMENT"  # too many contents, before they would be held
        code, text = code_of(call, a_request(id="i" * 513))
        assert (code, "at most 512" in text) == ("INVALID_ARGUMENT", True)
        assert is_well(running)


def test_a_message_of_very_many_fields_costs_no_time():
    with serving(echo_face()) as running, calling(running) as call:
        for data in (b"\x48\x00" * (10 << 20), b"\x2a\x00" * (10 << 20), b"\x3a\x00" * (10 << 20)):
            began = time.monotonic()
            code, text = code_of(call, data)
            assert (code, "more than 10000 fields" in text) == ("INVALID_ARGUMENT", True)
            assert time.monotonic() - began < 20  # of the 60 that the call has
        code, text = code_of(call, b"\x1b\x1c" + b"\x2a\x00" * (10 << 20))
        assert (code, "cannot be read" in text) == ("INVALID_ARGUMENT", True)
        assert is_well(running)


def test_metadata_that_are_too_large():
    with serving(echo_face(), max_metadata_bytes=4096) as running, calling(running) as call:
        code, _ = code_of(call, a_request(), metadata=[("x", "y" * 8000)])
        assert code == "RESOURCE_EXHAUSTED"
        assert is_well(running)


def test_too_many_at_once():
    face = echo_face()
    with serving(face, max_rpcs=3) as running, calling(running) as call:
        face.hold = threading.Event()
        waiting = [call.future(a_request()) for _ in range(3)]
        end = time.monotonic() + 30
        while len(face.asked) < 3 and time.monotonic() < end:
            time.sleep(0.005)
        code, text = code_of(call, a_request())
        assert (code, "3 RPCs are open" in text) == ("RESOURCE_EXHAUSTED", True)
        face.hold.set()
        assert all(each.result() for each in waiting)
        assert running.is_idle()
        assert is_well(running)


def test_a_connection_is_told_how_many_rpcs_it_may_have_open():
    with serving(echo_face(), max_rpcs_per_connection=2) as running:
        told = struct.pack(">HI", 3, 2)  # SETTINGS_MAX_CONCURRENT_STREAMS
        assert told in talk(running, PREFACE + frame(SETTINGS), wanted=told)
        begun = b"".join(frame(HEADERS, 4, 2 * i + 1, headers()) for i in range(100))
        most, until = 0, time.monotonic() + 30
        with socket.create_connection(("127.0.0.1", running.server.port), 30) as peer:
            peer.sendall(PREFACE + frame(SETTINGS) + begun)
            while time.monotonic() < until:
                if not most and running.server.open_rpcs:
                    until = time.monotonic() + 1.0
                most = max(most, running.server.open_rpcs)
                time.sleep(0.01)
        assert 1 <= most < 10
        assert is_well(running)


def test_a_request_that_never_ends():
    with serving(echo_face(), receive_timeout_s=0.3) as running:
        begun = PREFACE + frame(SETTINGS) + frame(HEADERS, 4, 1, headers())
        for part in (b"", frame(DATA, 0, 1, b"\x00\x00\x00\x10\x00abc")):
            said = b"not there after 0.3 s"
            assert said in talk(running, begun + part, wanted=said)
        assert running.is_idle()
        for again in (True, True, False):
            try:
                assert is_well(running)
                break
            except grpc.RpcError:  # a machine that stood still for 0.3 s
                assert again


def test_an_rpc_without_a_request_or_of_no_method():
    with serving(echo_face()) as running:
        for path, said in ((INFER, b"the RPC has no request"), ("/a/b", b"there is no method /a/b")):
            found = talk(running, PREFACE + frame(SETTINGS) + frame(HEADERS, 5, 1, headers(path)), wanted=said)
            assert said in found
        assert running.is_idle()


def test_many_that_open_and_cancel_at_once():
    """The attack that is called rapid reset (CVE-2023-44487)."""
    with serving(echo_face(), max_rpcs=100) as running:
        resets = b"".join(
            frame(HEADERS, 4, 2 * i + 1, headers()) + frame(RESET, 0, 2 * i + 1, struct.pack(">I", 8))
            for i in range(5000)
        )
        talk(running, PREFACE + frame(SETTINGS) + resets, 2.0)
        assert running.is_idle()
        assert is_well(running)


def test_a_client_that_pings_too_often_is_sent_away():
    with serving(echo_face(), ping_interval_s=60.0) as running:
        pings = PREFACE + frame(SETTINGS) + frame(PING, 0, 0, bytes(8)) * 20
        found = talk(running, pings, wanted=b"too_many_pings")
        assert b"too_many_pings" in found
        assert is_well(running)


def test_no_more_connections_than_allowed():
    with serving(echo_face(), max_connections=5) as running:
        peers = [socket.create_connection(("127.0.0.1", running.server.port), 5) for _ in range(20)]
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(PREFACE + frame(SETTINGS))
        there, until = set(), time.monotonic() + 30
        while time.monotonic() < until:
            for peer in set(peers) - there:
                peer.setblocking(False)
                with contextlib.suppress(OSError):
                    if peer.recv(100):
                        there.add(peer)
                        until = min(until, time.monotonic() + 0.5)  # for those that are not to come
            time.sleep(0.01)
        for peer in peers:
            peer.close()
        assert 1 <= len(there) <= 5
        end = time.monotonic() + 30
        while True:
            try:
                assert is_well(running)
                break
            except grpc.RpcError:  # their places are not free yet
                assert time.monotonic() < end


def test_garbage_on_the_socket():
    rng = np.random.default_rng(0)
    with serving(echo_face()) as running:
        for size in (1, 10, 100, 10_000):
            noise = rng.integers(0, 256, size, np.uint8).tobytes()
            for data in (noise, PREFACE + noise, PREFACE + frame(SETTINGS) + noise):
                talk(running, data, 0.2)
        assert is_well(running)


def test_bytes_of_every_kind_end_in_an_answer_or_an_invalid_argument():
    good = a_request()
    face = echo_face()
    with serving(face) as running, calling(running) as call:

        @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def check(draw):
            data = bytearray(good)
            for _ in range(draw.draw(st.integers(0, 4))):
                place = draw.draw(st.integers(0, len(data) - 1))
                data[place : place + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(max_size=4))
                data = data or bytearray(b"\x00")
            try:
                call(bytes(data), timeout=60)
            except grpc.RpcError as refused:
                assert refused.code().name in ("INVALID_ARGUMENT", "NOT_FOUND"), refused

        check()
        assert face.unreleased == 0
        assert is_well(running)
        assert running.is_idle()


def test_nothing_is_left_of_clients_that_come_and_go():
    face = echo_face()
    with serving(face) as running:

        def come_and_go():
            for _ in range(40):
                with calling(running) as call:
                    call(a_request(), timeout=60)

        come_and_go()
        time.sleep(0.3)
        before = len(os.listdir("/proc/self/fd"))
        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 30
        while len(os.listdir("/proc/self/fd")) > before + 4 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        assert running.is_idle()


def a_certificate(folder, name, authority=None):
    """A certificate of 127.0.0.1, its own or another's signature under it, and its key; paths and what signs more."""
    x509 = pytest.importorskip("cryptography.x509")
    import datetime
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, signer = (subject, key) if authority is None else authority
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(signer, hashes.SHA256())
    )
    certificate, secret = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret, (subject, key)


def test_tls_with_and_without_client_certificates(tmp_path):
    authority, _, signer = a_certificate(tmp_path, "authority")
    certificate, key, _ = a_certificate(tmp_path, "server", signer)
    mine, my_key, _ = a_certificate(tmp_path, "client", signer)
    other, other_key, _ = a_certificate(tmp_path, "other")

    def infer(running, **options):
        url = f"127.0.0.1:{running.server.port}"
        with client.InferenceServerClient(url, ssl=True, root_certificates=str(authority), **options) as triton:
            item = client.InferInput("x", [1, 3], "FP32").set_data_from_numpy(np.ones((1, 3), np.float32))
            return triton.infer("echo", [item], client_timeout=60).as_numpy("y").tolist()

    listen = GrpcListen(port=0, certificate=certificate, key=key)
    with serving(echo_face(), listen) as running:
        assert infer(running) == [[2, 2, 2]]
        with calling(running) as call:
            assert code_of(call, a_request())[0] == "UNAVAILABLE"
    listen = GrpcListen(port=0, certificate=certificate, key=key, client_ca=authority)
    with serving(echo_face(), listen) as running:
        assert infer(running, private_key=str(my_key), certificate_chain=str(mine)) == [[2, 2, 2]]
        for wrong in ({}, {"private_key": str(other_key), "certificate_chain": str(other)}):
            with pytest.raises(client.InferenceServerException) as refused:
                infer(running, **wrong)
            assert refused.value.status() == "StatusCode.UNAVAILABLE"
    for wrong in (
        GrpcListen(port=0, certificate=tmp_path / "none"),
        GrpcListen(port=0, certificate=certificate, key=other_key),
    ):
        with pytest.raises(UsageError, match="TLS files"), serving(echo_face(), wrong):
            pass
