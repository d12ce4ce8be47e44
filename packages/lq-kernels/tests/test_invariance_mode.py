"""The switch of the batch-invariant mode: whom it holds for, as a context, a decorator and for the process."""

import contextlib
import gc
import inspect
import threading

import pytest
from lq_formats import SpecError, UnsupportedError
from lq_kernels import batch_invariant, is_batch_invariant, set_batch_invariant


class TestMode:
    def test_nests_and_ends(self):
        assert not is_batch_invariant()
        mode = batch_invariant()
        with mode:
            assert is_batch_invariant()
            with batch_invariant(False):
                assert not is_batch_invariant()
                with mode:
                    assert is_batch_invariant()
                assert not is_batch_invariant()
            assert is_batch_invariant()
        assert not is_batch_invariant()

    def test_ends_with_an_exception(self):
        with pytest.raises(ZeroDivisionError), batch_invariant():
            raise ZeroDivisionError
        assert not is_batch_invariant()

    def test_decorates(self):
        @batch_invariant()
        def mode(depth):
            return [is_batch_invariant(), *(mode(depth - 1) if depth else ())]

        assert mode(2) == [True] * 3
        assert not is_batch_invariant()

    def test_decorates_a_generator_whenever_it_runs(self):
        """What is sent, thrown and returned goes through; the consumer has the mode that it chose itself."""

        @batch_invariant()
        def modes(count):
            """A docstring."""
            for _ in range(count):
                try:
                    seen.append((yield is_batch_invariant()))
                except ZeroDivisionError as error:
                    seen.append(error)
                seen.append(is_batch_invariant())
            return "done", is_batch_invariant()

        seen = []
        assert inspect.isgeneratorfunction(modes)
        assert (modes.__name__, modes.__doc__) == ("modes", "A docstring.")
        assert list(modes(2)) == [True, True]
        assert seen == [None, True] * 2
        seen.clear()
        generator, thrown = modes(2), ZeroDivisionError()
        assert next(generator)
        assert not is_batch_invariant()
        with batch_invariant(False):
            assert generator.send("sent")
            assert not is_batch_invariant()
        assert not is_batch_invariant()
        with pytest.raises(StopIteration) as stop:
            generator.throw(thrown)
        assert stop.value.value == ("done", True)
        assert seen == ["sent", True, thrown, True]
        assert not is_batch_invariant()

    @pytest.mark.parametrize("end", ["close", "raise", "collect"])
    def test_a_generator_ends_in_the_mode_and_leaves_it(self, end):
        seen = []

        @batch_invariant()
        @batch_invariant(False)
        @batch_invariant()
        def inner():
            try:
                yield is_batch_invariant()
            finally:
                seen.append(is_batch_invariant())

        @batch_invariant(False)
        def outer():
            seen.append(is_batch_invariant())
            yield from inner()

        generator = outer()
        assert next(generator)
        if end == "close":
            generator.close()
        elif end == "raise":
            with pytest.raises(ZeroDivisionError):
                generator.throw(ZeroDivisionError)
        else:
            del generator
            gc.collect()
        assert seen == [False, True]
        assert not is_batch_invariant()

    def test_a_generator_that_goes_on_after_close_is_an_error(self):
        @batch_invariant()
        def stubborn():
            for _ in range(2):
                with contextlib.suppress(GeneratorExit):
                    yield is_batch_invariant()

        generator = stubborn()
        next(generator)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            generator.close()
        assert not is_batch_invariant()

    def test_decorates_methods(self):
        class Model:
            @batch_invariant()
            def mode(self):
                return is_batch_invariant()

            @batch_invariant()
            def modes(self):
                yield is_batch_invariant()

            @batch_invariant()
            @staticmethod
            def static_modes():
                yield is_batch_invariant()

        model = Model()
        assert model.mode()
        assert list(model.modes()) == list(Model.static_modes()) == [True]

    def test_refuses_what_is_no_bool(self):
        for wrong in ("no", 1, None):
            for switch in (batch_invariant, set_batch_invariant):
                with pytest.raises(SpecError, match=r"expected True or False$"):
                    switch(wrong)
        with pytest.raises(SpecError, match=r"a decorator is written with parentheses, @batch_invariant\(\)"):

            @batch_invariant
            def product():
                return is_batch_invariant()

        assert not is_batch_invariant()

    def test_refuses_what_is_asynchronous(self):
        """Their mode would be that of whatever else the thread runs meanwhile."""

        async def coroutine():
            return is_batch_invariant()

        async def generator():
            yield is_batch_invariant()

        for function in (coroutine, generator, staticmethod(coroutine)):
            with pytest.raises(UnsupportedError, match=r"which is asynchronous: .*write 'with batch_inv"):
                batch_invariant()(function)

    def test_belongs_to_a_thread_and_the_switch_to_the_process(self):
        seen = []

        def look():
            thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
            thread.start()
            thread.join()

        with batch_invariant():
            look()
        set_batch_invariant(True)
        try:
            look()
            assert is_batch_invariant()
            with batch_invariant(False):
                assert not is_batch_invariant()
                look()
        finally:
            set_batch_invariant(False)
        look()
        assert seen == [False, True, True, False]
