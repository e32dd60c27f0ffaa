"""Messages and descriptors over real sockets, within one process and between two."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onecard.errors import EngineError, StorageError, UsageError
from onecard.ipc import packets
from onecard.ipc.segment import Segment
from tests.unit.ipc.peer import GREETING

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SOCK_SEQPACKET with descriptors needs Linux"),
    pytest.mark.timeout(200),
]
PEER = Path(__file__).with_name("peer.py")
LARGEST_BUFFER = Path("/proc/sys/net/core/wmem_max")
takes_the_longest = pytest.mark.skipif(
    LARGEST_BUFFER.exists() and int(LARGEST_BUFFER.read_text()) < packets.MOST_BYTES,
    reason=f"net.core.wmem_max is below {packets.MOST_BYTES}",
)


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair(tmp_path):
    """The two ends of a connection: the one that connected, and the one that accepted it."""
    with (
        packets.listen(tmp_path / "s") as listener,
        packets.connect(tmp_path / "s") as ours,
        packets.accept(listener) as theirs,
    ):
        yield ours, theirs


@pytest.fixture
def peer(tmp_path):
    """Starts another process in a role; gives the process and the connection to it."""
    started = []

    def start(role: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        command = [sys.executable, str(PEER), str(tmp_path / "peer"), role]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        listener.settimeout(60)
        sock = packets.accept(listener)
        started.append((process, sock))
        return process, sock

    with packets.listen(tmp_path / "peer") as listener:
        yield start
        for process, sock in started:
            sock.close()
            process.kill()
            process.communicate()


def test_messages_stay_apart_and_in_order(pair):
    ours, theirs = pair
    for message in (b"a", b"bc" * 1000, b"\0"):
        packets.send(ours, message)
    assert [packets.receive(theirs) for _ in range(3)] == [(b"a", []), (b"bc" * 1000, []), (b"\0", [])]


@takes_the_longest
def test_the_longest_message_goes_both_ways(pair):
    longest = os.urandom(packets.MOST_BYTES)
    for sender, receiver in (pair, pair[::-1]):
        thread = threading.Thread(target=packets.send, args=(sender, longest))
        thread.start()
        assert packets.receive(receiver) == (longest, [])
        thread.join()


def test_a_message_that_is_too_long_or_empty_is_not_sent(pair):
    with pytest.raises(EngineError, match="at most 1,048,576 bytes, not 1,048,577"):
        packets.send(pair[0], bytes(packets.MOST_BYTES + 1))
    with pytest.raises(ValueError, match="end of the connection"):
        packets.send(pair[0], b"")
    packets.send(pair[0], b"next")
    assert packets.receive(pair[1]) == (b"next", [])


def test_what_the_kernel_does_not_take_is_said_with_a_cure(pair):
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    with pytest.raises(
        EngineError, match=r"no message of 100,000 bytes with a send buffer of 16,384.*net.core.wmem_max"
    ):
        packets.send(pair[0], bytes(100_000))


@takes_the_longest
@pytest.mark.parametrize("receive", [packets.receive, packets.receive_view])
def test_a_message_that_is_too_long_is_dropped_by_the_receiver(pair, receive):
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * packets.MOST_BYTES)
    ours.send(bytes(packets.MOST_BYTES + 1))
    packets.send(ours, b"next")
    with pytest.raises(EngineError, match="more than 1,048,576 bytes"):
        receive(theirs)
    assert packets.receive(theirs) == (b"next", [])


@takes_the_longest
def test_a_view_holds_one_message_wholly_until_the_next_one_comes(pair):
    ours, theirs = pair
    theirs.setblocking(False)
    longest = os.urandom(packets.MOST_BYTES)
    for message in (longest, b"next"):
        packets.send(ours, message)
        view = packets.receive_view(theirs)
        assert view == message
    with pytest.raises(BlockingIOError):
        packets.receive_view(theirs)
    ours.close()
    assert packets.receive_view(theirs) == b""


def test_descriptors_that_come_with_a_view_are_closed(pair):
    ours, theirs = pair
    before = open_descriptors()
    packets.send(ours, b"three", [0, 0, 0])
    packets.send(ours, b"next")
    assert packets.receive_view(theirs) == b"three"
    assert packets.receive_view(theirs) == b"next"
    assert open_descriptors() == before


def test_descriptors_come_with_their_message_and_are_not_inherited(pair):
    ours, theirs = pair
    first, second = Segment.create("first", 4096), Segment.create("second", 8192)
    packets.send(ours, b"two", [first.fd, second.fd])
    packets.send(ours, b"none")
    message, received = packets.receive(theirs, descriptors=2)
    assert (message, len(received)) == (b"two", 2)
    assert not any(os.get_inheritable(fd) for fd in received)
    attached = [Segment.attach(fd, nbytes) for fd, nbytes in zip(received, (4096, 8192), strict=True)]
    first.array[0], second.array[0] = 1, 2
    assert [int(segment.array[0]) for segment in attached] == [1, 2]
    assert packets.receive(theirs, descriptors=2) == (b"none", [])
    for segment in (first, second, *attached):
        segment.close()


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_more_descriptors_than_allowed_are_refused_and_none_stays_open(pair, allowed):
    ours, theirs = pair
    before = open_descriptors()
    packets.send(ours, b"three", [0, 0, 0])
    with pytest.raises(EngineError, match=f"or {allowed} descriptors"):
        packets.receive(theirs, descriptors=allowed)
    assert open_descriptors() == before
    packets.send(ours, b"next")
    assert packets.receive(theirs) == (b"next", [])


def test_other_ancillary_data_is_no_descriptor(pair):
    """Credentials come with every message once a socket asks for them."""
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    packets.send(ours, b"hello")
    assert packets.receive(theirs, descriptors=8) == (b"hello", [])


def test_a_full_socket_takes_a_message_wholly_or_not_at_all(pair):
    ours, theirs = pair
    ours.setblocking(False)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        packets.receive(theirs)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            packets.send(ours, b"%9d" % sent * 1000)
            sent += 1
    assert [packets.receive(theirs)[0] for _ in range(sent)] == [b"%9d" % n * 1000 for n in range(sent)]
    packets.send(ours, b"again")
    assert packets.receive(theirs) == (b"again", [])


def test_many_short_messages_fit_before_the_reader_wakes(pair):
    for sender, receiver in (pair, pair[::-1]):
        sender.setblocking(False)
        for _ in range(400):
            packets.send(sender, b"x" * 200)
        assert {packets.receive(receiver)[0] for _ in range(400)} == {b"x" * 200}


def test_what_was_sent_before_the_end_is_received_though_the_peer_left_ours_unread(pair):
    """The kernel then says 'connection reset' before it gives the peer's last messages."""
    ours, theirs = pair
    packets.send(ours, b"unread")
    packets.send(theirs, b"last")
    theirs.close()
    assert [packets.receive(ours) for _ in range(3)] == [(b"last", []), (b"", []), (b"", [])]


def test_views_tell_of_the_reset_and_then_what_was_sent_before(pair):
    ours, theirs = pair
    packets.send(ours, b"unread")
    packets.send(theirs, b"last")
    theirs.close()
    with pytest.raises(ConnectionResetError):
        packets.receive_view(ours)
    assert [bytes(packets.receive_view(ours)) for _ in range(3)] == [b"last", b"", b""]


def test_sending_to_a_peer_that_is_gone_is_a_reset(pair):
    ours, theirs = pair
    theirs.close()
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            packets.send(ours, b"anyone?")
        with pytest.raises(ConnectionResetError):
            packets.send(ours, b"anyone?", [0])


def test_threads_receive_into_buffers_of_their_own(tmp_path):
    """Two connections, two threads, messages of one letter each: none holds another's."""
    found: dict[str, set[bytes]] = {}

    def read(letter: str, sock: socket.socket) -> None:
        messages = iter(lambda: packets.receive(sock)[0], b"")
        found[letter] = {bytes(set(message)) for message in messages}

    def write(letter: str, sock: socket.socket) -> None:
        with sock:
            for _ in range(100):
                packets.send(sock, letter.encode() * 100_000)

    with packets.listen(tmp_path / "s") as listener:
        threads, accepted = [], []
        for letter in "ab":
            sender = packets.connect(tmp_path / "s")
            accepted.append(packets.accept(listener))
            threads.append(threading.Thread(target=read, args=(letter, accepted[-1])))
            threads.append(threading.Thread(target=write, args=(letter, sender)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sock in accepted:
            sock.close()
    assert found == {"a": {b"a"}, "b": {b"b"}}


def test_only_this_user_may_connect_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        packets.listen(tmp_path / "s").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_peers_of_this_user_are_told_from_others(pair):
    assert all(packets.same_user(sock) for sock in pair)
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    os.seteuid(65534)
    try:
        others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    finally:
        os.seteuid(0)
    assert not any(packets.same_user(sock) for sock in others)
    for sock in others:
        sock.close()


def test_a_path_that_the_kernel_cannot_take_is_refused(tmp_path):
    folder = tmp_path / "ä"
    folder.mkdir()
    room = packets.MOST_PATH_BYTES - len(os.fsencode(folder)) - 1
    with packets.listen(folder / ("x" * room)), packets.connect(folder / ("x" * room)):
        pass
    for call in (packets.listen, packets.connect):
        with pytest.raises(UsageError, match=r"at most 107 bytes, and .* has 108"):
            call(folder / ("x" * (room + 1)))


def test_a_place_where_no_socket_can_be_is_refused(tmp_path):
    with pytest.raises(StorageError, match="No such file or directory"):
        packets.listen(tmp_path / "missing" / "s")
    packets.listen(tmp_path / "s").close()
    with pytest.raises(UsageError, match=r"There is a file at .* already"):
        packets.listen(tmp_path / "s")


def test_connecting_where_nobody_listens_says_which(tmp_path):
    with pytest.raises(FileNotFoundError):
        packets.connect(tmp_path / "s")
    packets.listen(tmp_path / "s").close()
    with pytest.raises(ConnectionRefusedError):
        packets.connect(tmp_path / "s")


def test_other_systems_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="need Linux, and this is darwin"):
        packets.listen(tmp_path / "s")


def test_another_process_reads_and_writes_our_segment(peer):
    _, sock = peer("read")
    segment = Segment.create("ours", 1 << 20)
    segment.view(70_000, 5)[:] = b"hello"
    packets.send(sock, b"%d 70000 5" % segment.nbytes, [segment.fd])
    assert packets.receive(sock) == (b"hello", [])
    assert bytes(segment.view(70_000, 10)) == b"helloHELLO"
    segment.close()


def test_a_segment_outlives_the_process_that_made_it(peer):
    process, sock = peer("write")
    process.wait(60)
    message, (fd,) = packets.receive(sock, descriptors=1)
    nbytes, offset = map(int, message.split())
    segment = Segment.attach(fd, nbytes)
    assert bytes(segment.view(offset, len(GREETING))) == GREETING
    assert packets.receive(sock) == (b"", [])
    segment.close()


@takes_the_longest
def test_long_messages_go_through_another_process(peer):
    process, sock = peer("echo")
    for nbytes in (1, 16_384, packets.MOST_BYTES):
        message = os.urandom(nbytes)
        packets.send(sock, message)
        assert packets.receive(sock) == (message, [])
    sock.shutdown(socket.SHUT_WR)
    assert process.wait(60) == 0


def test_a_killed_peer_is_the_end_of_the_connection(peer):
    process, sock = peer("count")
    assert process.stdout.readline() == b"sent\n"
    packets.send(sock, b"never read")
    process.kill()
    process.wait(60)
    assert [packets.receive(sock)[0] for _ in range(4)] == [b"1", b"2", b"3", b""]
    with pytest.raises(ConnectionResetError):
        packets.send(sock, b"anyone?")
