import pytest
from tvm import rpc

from tvm_lowrank.errors import UserError
from tvm_lowrank.targets import emulate, tracker


def test_tracker_answers():
    with emulate.tracker() as port:
        assert tracker.summary("127.0.0.1", port)["queue_info"] == {}
        with pytest.raises(TimeoutError):
            tracker.request("127.0.0.1", port, "nobody", timeout=0.2)
        assert rpc.connect_tracker("127.0.0.1", port).summary()["server_info"] == []


def test_address_comes_from_the_option_or_the_environment(monkeypatch):
    for name in ("TVM_TRACKER_HOST", "TVM_TRACKER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert tracker.tracker_address(None) is None
    monkeypatch.setenv("TVM_TRACKER_HOST", "pi.local")
    assert tracker.tracker_address(None) == ("pi.local", 9190)
    monkeypatch.setenv("TVM_TRACKER_PORT", "9191")
    assert tracker.tracker_address(None) == ("pi.local", 9191)
    assert tracker.tracker_address("::1:9000") == ("::1", 9000)


@pytest.mark.parametrize("text", ["", "host", ":9190", "host:", "host:port", "host:0", "host:70000"])
def test_what_is_no_address_is_an_error(text):
    with pytest.raises(UserError, match="is not HOST:PORT, such as"):
        tracker.tracker_address(text)
