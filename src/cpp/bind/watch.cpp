// What a fused model asks before each call, of a thousand places: whether all that it was made of
// is still there and as it was. From Python that takes longer than its small layers do.
#include <utility>
#include <vector>

#include "bind/tensors.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// What lay in some dictionaries (of modules) under some names, and the sizes of others, when this
// was made.
class Watch {
 public:
  explicit Watch(const py::list& places) {
    for (const py::handle& place : places) {
      const auto pair = py::cast<py::tuple>(place);
      held_.push_back(pair);
      Entry e{pair[0].ptr(), pair[1].ptr(), nullptr, nullptr, nullptr, kPlain, -1};
      const bool whole = e.name == Py_None;
      if (!PyDict_Check(e.place) || !(whole || PyUnicode_Check(e.name)))
        throw py::type_error("Watch: places: expected pairs of a dictionary and a name or None");
      if (entries_.empty() || entries_.back().place != e.place) e.table = table_of(e.place);
      if (whole) {
        e.kind = kSize, e.object = e.place, e.detail = PyDict_Size(e.place);
      } else if ((e.object = get(e))) {
        e.type = Py_TYPE(e.object);
        held_.push_back(py::reinterpret_borrow<py::object>(e.object));
        see(e);
      }
      entries_.push_back(e);
    }
  }

  // For Python's collector: modules may lead back to who holds this.
  int visit(visitproc call, void* argument) const {
    for (const py::object& object : held_)
      if (const int stop = call(object.ptr(), argument)) return stop;
    return 0;
  }
  void clear() {
    entries_.clear();
    std::vector<py::object>().swap(held_);
  }

  // Whether the same objects lie there, of the same classes: tensors with the same memory, to which
  // nothing was written, dictionaries of the same size, and lists of the same objects.
  bool same() const {
    // Since the last call the layers' filters went through the caches, and each of these waits for
    // several lines, one found by the other: the first ones are asked for ahead.
    constexpr size_t kAhead = 16;
    for (size_t i = 0; i < entries_.size(); i++) {
      if (i + kAhead < entries_.size()) {
        const Entry& next = entries_[i + kAhead];
        __builtin_prefetch(next.object);
        if (next.table) {
          __builtin_prefetch(next.place);
          for (const int line : {0, 64, 128, 192}) __builtin_prefetch(next.table + line);
        }
        if (next.kind == kTensor) {
          const char* shape = tensors_[size_t(next.detail)].shape;
          for (const int line : {-64, 0, 64}) __builtin_prefetch(shape + line);
        }
      }
      const Entry& e = entries_[i];
      if (e.kind == kSize) {
        if (PyDict_Size(e.place) != e.detail) return false;
        continue;
      }
      if (get(e) != e.object || e.kind == kUnknown) return false;
      if (e.object && Py_TYPE(e.object) != e.type) return false;
      if (e.kind == kList && !same_list(e.object, held_[size_t(e.detail)].ptr())) return false;
      if (e.kind == kDict && PyDict_Size(e.object) != e.detail) return false;
      if (e.kind == kTensor && !same_tensor(e.object, tensors_[size_t(e.detail)])) return false;
    }
    return true;
  }

 private:
  // A tensor that cannot be read in C is never the same.
  enum Kind { kPlain, kSize, kDict, kList, kTensor, kUnknown };
  struct Entry {
    PyObject *place, *name, *object;
    PyTypeObject* type;
    const char* table;  // where the dictionary keeps what lies in it; null: the last entry's
    Kind kind;
    int64_t
        detail;  // a dictionary's size, a tensor's index, that of a list's copy among those held
  };
  struct Seen {
    char* data;
    const char* shape;  // where torch keeps it: near what else it keeps of this tensor
    DType type;
    bool counts;  // what is written to it: tensors made under inference mode do not, and raise
    int64_t version;
  };

  static const char* table_of(PyObject* dict) {
    const auto* d = reinterpret_cast<PyDictObject*>(dict);
    return d->ma_values ? reinterpret_cast<const char*>(d->ma_values)
                        : reinterpret_cast<const char*>(d->ma_keys);
  }
  static PyObject* get(const Entry& e) {
    PyObject* found = PyDict_GetItemWithError(e.place, e.name);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }
  static bool same_list(PyObject* list, PyObject* before) {
    const Py_ssize_t size = PyList_GET_SIZE(list);
    if (size != PyTuple_GET_SIZE(before)) return false;
    for (Py_ssize_t i = 0; i < size; i++)
      if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(before, i)) return false;
    return true;
  }
  static bool version_of(PyObject* tensor, int64_t& version) {
    static PyObject* name = PyUnicode_InternFromString("_version");
    PyObject* number = PyObject_GetAttr(tensor, name);
    if (number) version = PyLong_AsLongLong(number);
    Py_XDECREF(number);
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
  static bool same_tensor(PyObject* object, const Seen& seen) {
    tensors::Tensor t;
    int64_t version = seen.version;
    return tensors::read(object, t, true) && t.data == seen.data && t.type == seen.type &&
           (!seen.counts || version_of(object, version)) && version == seen.version;
  }
  void see(Entry& e) {
    tensors::Tensor t;
    if (PyDict_Check(e.object)) {
      e.kind = kDict, e.detail = PyDict_Size(e.object);
    } else if (PyList_CheckExact(e.object)) {
      e.kind = kList, e.detail = int64_t(held_.size());
      held_.push_back(py::reinterpret_steal<py::object>(PyList_AsTuple(e.object)));
    } else if (tensors::readable() && tensors::read(e.object, t, true)) {
      Seen seen{t.data, reinterpret_cast<const char*>(t.shape), t.type, false, 0};
      seen.counts = version_of(e.object, seen.version);
      e.kind = kTensor, e.detail = int64_t(tensors_.size());
      tensors_.push_back(seen);
    } else if (PyObject_HasAttrString(e.object, "data_ptr")) {
      e.kind = kUnknown;
    }
  }

  std::vector<Entry> entries_;
  std::vector<Seen> tensors_;
  std::vector<py::object> held_;  // what the entries point to
};

// Null while it is being made.
Watch* watch_of(PyObject* self) {
  auto found = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return found.holder_constructed() ? static_cast<Watch*>(found.value_ptr()) : nullptr;
}

void collect(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Watch* watch = watch_of(self);
    return watch ? watch->visit(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (Watch* watch = watch_of(self)) watch->clear();
    return 0;
  };
}

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<Watch>(
      m, "Watch", py::custom_type_setup(collect),
      "What lies in these dictionaries under these names, [(dict, name), ...], or their sizes, "
      "[(dict, None), ...].")
      .def(py::init<const py::list&>())
      .def("same", &Watch::same,
           "Whether the same lies there now: classes and tensors unchanged, dictionaries of the "
           "same size, lists "
           "with the same objects.");
}
