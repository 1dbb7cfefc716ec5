// SPDX-License-Identifier: Apache-2.0
// A fingerprint lists, in the order of one walk, all that a plan has been made of: the identity of every attribute,
// parameter, buffer, hook and child of some modules, what their tensors are, and entries of other dicts and classes.
// It holds while the same walk gives the same list.  Recording and comparing are one code path, so that nothing is
// recorded that is not compared.  The walk runs no Python code of modules; it takes about 10 ns an attribute.
//
// A fingerprint owns what it lists: an address stands for one object only while that lives.  It does not own the
// modules that it is given, which may own it; the garbage collector sees what it owns.
#include "python/fingerprint.h"

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fastdense {
namespace {

// Attributes of attributes that are looked at: a dict in an object in a list, but no further.
constexpr int kDepth = 3;
// Of larger containers only the size is looked at: tables, not settings.
constexpr Py_ssize_t kMostItems = 4096;
// Modules inside each other; more are a circle.
constexpr int kNesting = 200;

using Word = uintptr_t;

// Appends to the list, and owns what it lists.
class Recorder {
 public:
  Recorder(std::vector<Word>& words, std::vector<PyObject*>& owned) : words_(words), owned_(owned) {}

  bool word(Word w) {
    words_.push_back(w);
    return true;
  }
  bool object(PyObject* o) {
    if (o != nullptr && o != Py_None && o != Py_True && o != Py_False) {
      Py_INCREF(o);
      owned_.push_back(o);
    }
    return word(reinterpret_cast<Word>(o));
  }

 private:
  std::vector<Word>& words_;
  std::vector<PyObject*>& owned_;
};

// Walks along the list.
class Comparer {
 public:
  explicit Comparer(const std::vector<Word>& words) : at_(words.data()), end_(at_ + words.size()) {}

  bool word(Word w) { return at_ != end_ && *at_++ == w; }
  bool object(PyObject* o) { return word(reinterpret_cast<Word>(o)); }
  bool is_at_end() const { return at_ == end_; }

 private:
  const Word* at_;
  const Word* end_;
};

struct Names {
  PyObject* state = PyUnicode_InternFromString("_fastdense");
  PyObject* children = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
  PyObject* module = PyUnicode_InternFromString("__module__");
  PyObject* memory = PyUnicode_InternFromString("memory");
  PyTypeObject* module_class = nullptr;  // torch.nn.Module
};

const Names& names() {
  static const Names* known = [] {
    auto* made = new Names;  // never freed: the interpreter may end first
    py::object module = py::module_::import("torch.nn").attr("Module");
    made->module_class = reinterpret_cast<PyTypeObject*>(module.release().ptr());
    return made;
  }();
  return *known;
}

// Names of attributes are interned, but for those that came out of a pickle: these are other objects.
bool is_name(PyObject* key, PyObject* name) {
  if (key == name) return true;
  if (!PyUnicode_CheckExact(key)) return false;
  return !PyUnicode_CHECK_INTERNED(key) && PyUnicode_Compare(key, name) == 0;
}

bool is_tensor(PyObject* v) { return PyType_IsSubtype(Py_TYPE(v), reinterpret_cast<PyTypeObject*>(THPVariableClass)); }

// The walk.  Every function is false where the list differs, or where something cannot be listed.
template <typename Tape>
class Walk {
 public:
  explicit Walk(Tape& tape) : tape_(tape) {}

  bool module(PyObject* m, int nesting) {
    if (nesting > kNesting || !PyType_IsSubtype(Py_TYPE(m), names().module_class)) return false;
    if (!tape_.object(reinterpret_cast<PyObject*>(Py_TYPE(m)))) return false;
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(m, nullptr));
    if (!dict) return fail();
    PyObject *key, *found;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &found);) {
      if (is_name(key, names().state)) {
        if (!state(found)) return false;
      } else if (!tape_.object(key) || !tape_.object(found)) {
        return false;
      } else if (is_name(key, names().children) && PyDict_Check(found)) {
        const auto inner = [&](PyObject* child) { return child == Py_None || module(child, nesting + 1); };
        if (!items(found, inner, true)) return false;
      } else if ((is_name(key, names().parameters) || is_name(key, names().buffers)) && PyDict_Check(found)) {
        if (!items(found, [&](PyObject* t) { return t == Py_None || (is_tensor(t) && tensor(t)); })) return false;
      } else if (!value(found, kDepth)) {
        return false;
      }
    }
    return tape_.word(kEnd);
  }

  // What a value holds; its identity has been listed.
  bool value(PyObject* v, int depth) {
    PyTypeObject* type = Py_TYPE(v);
    if (v == Py_None || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
        type == &PyUnicode_Type)
      return true;
    const auto inner = [&](PyObject* item) { return value(item, depth - 1); };
    if (PyDict_Check(v)) return depth == 0 || items(v, inner);
    if (is_tensor(v)) return tensor(v) && version(v);
    if (PyFunction_Check(v)) return function(v);
    if (depth == 0 || PyType_Check(v) || PyModule_Check(v) || PyCFunction_Check(v) || PyMethod_Check(v)) return true;
    if (PyTuple_Check(v) || PyList_Check(v)) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(v);
      if (!tape_.word(Word(size))) return false;
      for (Py_ssize_t i = 0; i < size && size <= kMostItems; ++i) {
        PyObject* item = PySequence_Fast_GET_ITEM(v, i);
        if (!tape_.object(item) || !inner(item)) return false;
      }
      return true;
    }
    if (PyAnySet_Check(v))
      return tape_.word(Word(PySet_GET_SIZE(v))) &&
             (PySet_GET_SIZE(v) == 0 || PySet_GET_SIZE(v) > kMostItems || keys(v));
    return attributes(v, depth - 1);
  }

  bool function(PyObject* f) {
    return tape_.object(PyFunction_GET_CODE(f)) && tape_.object(PyFunction_GET_DEFAULTS(f)) &&
           tape_.object(PyFunction_GET_KW_DEFAULTS(f));
  }

 private:
  static constexpr Word kEnd = ~Word{0};

  static bool fail() {
    PyErr_Clear();
    return false;
  }

  // Of a module that is fused itself: how its plan is made.
  bool state(PyObject* s) {
    const auto memory = py::reinterpret_steal<py::object>(PyObject_GetAttr(s, names().memory));
    return memory ? tape_.object(memory.ptr()) : fail();
  }

  template <typename Inner>
  bool items(PyObject* dict, Inner inner, bool is_children = false) {
    if (!tape_.word(Word(PyDict_GET_SIZE(dict)))) return false;
    if (PyDict_GET_SIZE(dict) > kMostItems && !is_children) return true;
    // An ordered dict has an order of its own, which its fields do not tell.
    if (PyODict_Check(dict) && PyDict_GET_SIZE(dict) > 1 && !keys(dict)) return false;
    PyObject *key, *found;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &found);)
      if (!tape_.object(key) || !tape_.object(found) || !inner(found)) return false;
    return true;
  }

  bool keys(PyObject* container) {
    const auto iterator = py::reinterpret_steal<py::object>(PyObject_GetIter(container));
    if (!iterator) return fail();
    while (const auto key = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr())))
      if (!tape_.object(key.ptr())) return false;
    return PyErr_Occurred() ? fail() : tape_.word(kEnd);
  }

  // Of objects of other classes than torch's, as configurations are.
  bool attributes(PyObject* v, int depth) {
    PyTypeObject* type = Py_TYPE(v);
    if (!PyType_IsSubtype(type, names().module_class)) {
      const auto home = py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject*)type, names().module));
      if (!home || !PyUnicode_Check(home.ptr())) return fail() || true;
      const auto name = py::cast<std::string_view>(home);
      if (name == "torch" || name.substr(0, 6) == "torch.") return true;
    }
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(v, nullptr));
    if (!dict || !PyDict_Check(dict.ptr())) return fail() || true;
    return items(dict.ptr(), [&](PyObject* item) { return depth <= 0 || value(item, depth); });
  }

  // Code may have made numbers of the values of a tensor that is no parameter or buffer.
  bool version(PyObject* t) {
    const at::Tensor& unpacked = THPVariable_Unpack(t);
    return tape_.word(unpacked.is_inference() ? 0 : Word(unpacked._version()));
  }

  bool tensor(PyObject* t) {
    const at::Tensor& unpacked = THPVariable_Unpack(t);
    if (!unpacked.defined()) return false;
    const c10::TensorImpl& impl = *unpacked.unsafeGetTensorImpl();
    const auto keys = impl.key_set();
    // Tensors that belong to a graph, a transform or a mode have a life of their own: such plans are not kept.
    const c10::DispatchKeySet foreign({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper,
                                       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::NestedTensor});
    if (keys.has_any(foreign) || impl.layout() != c10::kStrided || impl.has_symbolic_sizes_strides() ||
        !unpacked.is_leaf())
      return false;
    const auto device = impl.device();
    const auto kind = Word(impl.requires_grad()) | Word(c10::typeMetaToScalarType(impl.dtype())) << 8 |
                      Word(device.type()) << 16 | Word(uint8_t(device.index())) << 24;
    if (!tape_.object(reinterpret_cast<PyObject*>(Py_TYPE(t))) || !tape_.word(Word(keys.raw_repr())) ||
        !tape_.word(kind) || !tape_.word(Word(impl.dim())))
      return false;
    for (const auto size : impl.sizes())
      if (!tape_.word(Word(size))) return false;
    return true;
  }

  Tape& tape_;
};

// What `key` names in a dict, or on a class through its bases; the content of a cell, without a key.
PyObject* look_up(PyObject* owner, PyObject* key) {
  if (PyCell_Check(owner)) return PyCell_GET(owner);
  if (PyType_Check(owner)) return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner), key);
  PyObject* found = PyDict_GetItemWithError(owner, key);
  if (found == nullptr) PyErr_Clear();
  return found;
}

class Fingerprint {
 public:
  Fingerprint(const py::tuple& modules, const py::list& entries) {
    for (const auto& entry : entries) {
      const auto [owner, key] = py::cast<std::pair<py::object, py::object>>(entry);
      if (!PyDict_Check(owner.ptr()) && !PyType_Check(owner.ptr()) && !PyCell_Check(owner.ptr()))
        throw py::type_error("Fingerprint: expected the owner of an entry to be a dict, a class or a cell");
      entries_.emplace_back(own(owner), own(key));
    }
    Recorder tape(words_, owned_);
    is_kept_ = !walk(tape, modules);
    if (!is_kept_) clear();
  }
  Fingerprint(const Fingerprint&) = delete;
  Fingerprint& operator=(const Fingerprint&) = delete;
  ~Fingerprint() { clear(); }

  bool is_kept() const { return is_kept_; }

  bool holds(const py::tuple& modules) const { return is_kept_ && !difference(modules); }

  // Which entry is not what it was, or -1 where a module is not; None where all hold.
  std::optional<int64_t> difference(const py::tuple& modules) const {
    Comparer tape(words_);
    const auto found = walk(tape, modules);
    if (found) return found;
    return tape.is_at_end() ? std::nullopt : std::optional<int64_t>(-1);
  }

  int traverse(visitproc visit, void* arg) const {
    for (const auto& [owner, key] : entries_) {
      Py_VISIT(owner);
      Py_VISIT(key);
    }
    for (PyObject* o : owned_) Py_VISIT(o);
    return 0;
  }

  void clear() {
    is_kept_ = false;
    for (PyObject* o : std::exchange(owned_, {})) Py_DECREF(o);
    for (const auto& [owner, key] : std::exchange(entries_, {})) {
      Py_DECREF(owner);
      Py_DECREF(key);
    }
  }

 private:
  static PyObject* own(py::object o) { return o.release().ptr(); }

  template <typename Tape>
  std::optional<int64_t> walk(Tape& tape, const py::tuple& modules) const {
    Walk<Tape> along(tape);
    for (size_t i = 0; i < entries_.size(); ++i) {
      PyObject* found = look_up(entries_[i].first, entries_[i].second);
      if (!tape.object(found) || (found != nullptr && !along.value(found, kDepth))) return int64_t(i);
    }
    for (const auto& module : modules)
      if (!along.module(module.ptr(), 0)) return -1;
    return std::nullopt;
  }

  std::vector<std::pair<PyObject*, PyObject*>> entries_;
  std::vector<Word> words_;
  std::vector<PyObject*> owned_;
  bool is_kept_ = false;
};

void let_the_collector_see(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<Fingerprint&>(py::handle(self)).traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Fingerprint&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

void bind_fingerprint(py::module_& m) {
  py::class_<Fingerprint>(m, "Fingerprint", py::custom_type_setup(let_the_collector_see))
      .def(py::init<const py::tuple&, const py::list&>(), py::arg("modules"), py::arg("entries"))
      .def_property_readonly("is_kept", &Fingerprint::is_kept)
      .def("holds", &Fingerprint::holds, py::arg("modules"))
      .def("difference", &Fingerprint::difference, py::arg("modules"));
}

}  // namespace fastdense
