"""Classes of modules that compute what the modules' own do, while nothing in them has changed."""

import functools
from typing import Any

from fastlora.reference import Gate
from fastlora.together.activations import reader_of
from fastlora.together.parts import is_called_plainly


class FusedModule:
    """A module with everything of it but one method. The base of bases of classes of :func:`fused_class`."""

    # the method
    _method = "forward"
    # of the class's name, given that of the module's own
    _title = "Fused{}"

    _modules: dict[str, Any]
    _plain: Any
    _names: Any
    _gate: Gate
    _read_gate: Any
    _forwards: dict[Any, Any]
    _made_of: tuple[Any, ...]

    @staticmethod
    def _names_in(plain: Any, *kinds: Any) -> Any:
        """Names of what the method of a class calls; None if it computes something else.

        Args:
            plain: The class.
            *kinds: Of the activation, and of other modules whose forward is not called.
        """
        raise NotImplementedError

    def _own_call(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._plain, self._method)(self, *args, **kwargs)

    def _is_known(self, activation: Any, *modules: Any) -> bool:
        """Whether the module's class, its activation and modules inside compute what they did."""
        forwards = self._forwards
        if getattr(self._plain, self._method) is not forwards[self._plain]:
            return False
        for module in (activation, *modules):
            kind = type(module)
            # a wrapper's, or that of no module
            if kind not in forwards or kind.forward is not forwards[kind] or not is_called_plainly(module):
                return False
        return self._read_gate(activation) == self._gate  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the module's own class, because this one stands in no file."""
        return _restored, self._made_of, self.__dict__


@functools.cache
def fused_class(base: Any, names: Any, gate: Gate, plain: Any, *kinds: Any) -> Any:
    """A module's class with another method.

    Args:
        base: Brings the method, a subclass of :class:`FusedModule`.
        names: What the module's own method calls, by name.
        gate: The op's name of the activation.
        plain: The module's own class.
        *kinds: Classes of the activation, and of other modules whose forward is not called.
    """
    method, own_method = getattr(base, base._method), getattr(plain, base._method)

    # with the signature and the source of the module's own, for whoever reads them
    @functools.wraps(own_method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    own = {base._method: call, "_plain": plain, "_names": names, "_gate": gate}
    read_gate: Any = reader_of(kinds[0])
    own |= {"_read_gate": staticmethod(read_gate), "_made_of": (base, names, gate, plain, *kinds)}
    forwards = {kind: kind.forward for kind in kinds} | {plain: own_method}
    own |= {"_forwards": forwards, "__module__": base.__module__}
    return type(base._title.format(plain.__name__), (base, plain), own)


def _restored(base: Any, names: Any, gate: Gate, plain: Any, *kinds: Any) -> Any:
    # where it was stored, these classes may have computed something else
    known = base._names_in(plain, *kinds) == names and reader_of(kinds[0]) is not None
    kind = fused_class(base, names, gate, plain, *kinds) if known else plain
    return kind.__new__(kind)
