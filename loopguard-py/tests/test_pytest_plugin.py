"""The pytest plugin, run on tests that block and tests that don't."""

import re

import pytest

pytest.importorskip("uvloop")

ASYNCIO = "asyncio_default_fixture_loop_scope = function\nasyncio_mode = auto"


def lines_of(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "ms at" in line or "not known" in line]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(f"[pytest]\n{ASYNCIO}\nloopguard_threshold_ms = 40")
    return pytester


def test_a_marked_test_that_blocks_fails_with_the_line(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import asyncio, time
        import pytest

        def slow():
            time.sleep(0.3)  # line 5

        @pytest.mark.no_blocking
        async def test_blocks():
            await asyncio.sleep(0)
            slow()

        async def test_unmarked():
            time.sleep(0.1)
        """
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    (line,) = set(lines_of(result))
    assert re.search(r"\d+\.\d ms at test_it.py:5 slow: time.sleep\(0.3\)  # line 5", line)


def test_who_else_blocks_the_tests_loop(project: pytest.Pytester) -> None:
    """A callback, another task, and one call of C code that holds the GIL."""
    project.makepyfile(
        test_it="""
        import asyncio, time

        async def test_callback():
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)
            await asyncio.sleep(0.01)

        async def test_task():
            async def other():
                time.sleep(0.3)
            await asyncio.gather(other(), asyncio.sleep(0.01))

        async def test_gil():
            numbers = range(30_000_000)
            await asyncio.sleep(0)
            sum(numbers)  # the line

        async def test_fine():
            await asyncio.sleep(0.3)
            await asyncio.to_thread(time.sleep, 0.3)
        """
    )
    result = project.runpytest_subprocess("--loopguard-all-async", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=3)
    output = "\n".join(lines_of(result))
    assert "test_task.<locals>.other: time.sleep(0.3)" in output
    assert "sum(numbers)  # the line" in output


def test_on_uvloop(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest, uvloop

        @pytest.fixture(scope="session")
        def event_loop_policy():
            return uvloop.EventLoopPolicy()
        """
    )
    project.makepyfile(
        test_it="""
        import asyncio, time

        async def test_blocks():
            assert "uvloop" in type(asyncio.get_running_loop()).__module__
            await asyncio.sleep(0)
            time.sleep(0.3)

        async def test_child():
            async def child():
                time.sleep(0.3)
            await asyncio.gather(child())

        async def test_fine():
            await asyncio.sleep(0.3)
        """
    )
    result = project.runpytest_subprocess("--loopguard-all-async", "-W", "ignore", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2)
    output = "\n".join(lines_of(result))
    assert "test_it.py:6 test_blocks: time.sleep(0.3)" in output
    assert "test_child.<locals>.child: time.sleep(0.3)" in output


def test_a_threshold_of_its_own_and_exceptions(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import time
        import pytest

        @pytest.mark.no_blocking(threshold_ms=60_000)
        async def test_patient():
            time.sleep(0.1)

        @pytest.mark.allow_blocking
        async def test_allowed():
            time.sleep(0.1)

        def test_synchronous():
            time.sleep(0.1)

        @pytest.mark.no_blocking(5)
        async def test_wrong():
            pass

        @pytest.mark.no_blocking(threshold_ms="soon")
        async def test_wrong_as_well():
            pass
        """
    )
    result = project.runpytest_subprocess("--loopguard-all-async", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(["*no_blocking takes nothing but threshold_ms=*", "*must be a positive number*'soon'*"])


def test_a_test_that_fails_by_itself_says_so_first(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_it="""
        import time

        async def test_both():
            time.sleep(0.3)
            assert 1 == 2
        """
    )
    result = project.runpytest_subprocess("--loopguard-all-async", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2", "*loopguard*", "*ms at test_it.py:4 test_both: time.sleep(0.3)*"])


def test_an_application_in_a_test_client(project: pytest.Pytester) -> None:
    """Its loop runs in another thread."""
    project.makepyfile(
        test_it="""
        import time
        import pytest
        from starlette.testclient import TestClient

        async def app(scope, receive, send):
            time.sleep(0.3)  # in the application
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        @pytest.mark.no_blocking
        def test_client():
            assert TestClient(app).get("/").status_code == 200
        """
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert "# in the application" in "\n".join(lines_of(result))
