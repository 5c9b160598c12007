// What a fused model asks before each call, of thousands of places: whether all that it was made of
// is still there and as it was. From Python that takes longer than its small layers do.
#include <unordered_map>
#include <utility>
#include <vector>

#include "bind/tensors.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

#if PY_VERSION_HEX < 0x030C0000
// Python up to 3.11 gives a dictionary a new number with each change of it.
constexpr bool kCountsChanges = true;
uint64_t changes_of(PyObject* dict) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
}
#else
constexpr bool kCountsChanges = false;
uint64_t changes_of(PyObject*) { return 0; }
#endif

// What lay in some dictionaries (of modules) under some names, and others whole, when this
// was made.
class Watch {
 public:
  explicit Watch(const py::list& places) {
    std::unordered_map<PyObject*, size_t> index;
    std::vector<std::vector<Entry>> entries;
    for (const py::handle& place : places) {
      const auto pair = py::cast<py::tuple>(place);
      PyObject *dict = pair[0].ptr(), *name = pair[1].ptr();
      if (!PyDict_Check(dict))
        throw py::type_error("Watch: places: expected pairs of a dictionary and a name or None");
      held_.push_back(pair);
      const auto [found, fresh] = index.try_emplace(dict, dicts_.size());
      if (fresh)
        dicts_.push_back({dict, table_of(dict), changes_of(dict), -1, 0}), entries.emplace_back();
      if (name == Py_None) {
        dicts_[found->second].size = PyDict_Size(dict);
        continue;
      }
      PyObject* object = get(dict, name);
      entries[found->second].push_back({name, object});
      if (!object) continue;
      held_.push_back(py::reinterpret_borrow<py::object>(object));
      see(object);
    }
    for (size_t i = 0; i < dicts_.size(); i++) {
      entries_.insert(entries_.end(), entries[i].begin(), entries[i].end());
      dicts_[i].end = entries_.size();
    }
  }

  // For Python's collector: modules may lead back to who holds this.
  int visit(visitproc call, void* argument) const {
    for (const py::object& object : held_)
      if (const int stop = call(object.ptr(), argument)) return stop;
    return 0;
  }
  void clear() {
    dicts_.clear(), contents_.clear();
    std::vector<py::object>().swap(held_);
  }

  // Whether the same objects lie there, of the same classes: tensors with the same memory, to which
  // nothing was written, dictionaries of the same size, and lists of the same objects.
  bool same() {
    // Since the last call the layers' filters went through the caches, and each of these waits for
    // several lines, one found by the other: the first ones are asked for ahead.
    constexpr size_t kAhead = 16;
    size_t begin = 0;
    for (size_t i = 0; i < dicts_.size(); begin = dicts_[i++].end) {
      if (i + kAhead < dicts_.size()) {
        __builtin_prefetch(dicts_[i + kAhead].dict);
        if (!kCountsChanges)
          for (const int line : {0, 64, 128, 192})
            __builtin_prefetch(dicts_[i + kAhead].table + line);
      }
      Dict& d = dicts_[i];
      const uint64_t changes = changes_of(d.dict);
      if (kCountsChanges && changes == d.changes) continue;
      if (kCountsChanges && d.size >= 0) return false;
      if (d.size >= 0 && PyDict_Size(d.dict) != d.size) return false;
      for (size_t k = begin; k < d.end; k++)
        if (get(d.dict, entries_[k].name) != entries_[k].object) return false;
      d.changes = changes;
    }
    for (size_t i = 0; i < contents_.size(); i++) {
      if (i + kAhead < contents_.size()) {
        const Content& next = contents_[i + kAhead];
        __builtin_prefetch(next.object);
        if (next.kind == kTensor) {
          const char* shape = tensors_[size_t(next.detail)].shape;
          for (const int line : {-64, 0, 64}) __builtin_prefetch(shape + line);
        }
      }
      if (!same_content(contents_[i])) return false;
    }
    return true;
  }

 private:
  struct Dict {
    PyObject* dict;
    const char* table;  // where it keeps what lies in it
    uint64_t changes;
    int64_t size;  // -1: whatever it is
    size_t end;    // of its entries
  };
  struct Entry {
    PyObject *name, *object;
  };
  // Of objects that change while they stay the same ones. A tensor that cannot be read in C is
  // never the same.
  enum Kind { kClass, kDict, kList, kTensor, kUnknown };
  struct Content {
    PyObject* object;
    PyTypeObject* type;
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
  static PyObject* get(PyObject* dict, PyObject* name) {
    PyObject* found = PyDict_GetItemWithError(dict, name);
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
  bool same_content(const Content& c) const {
    if (Py_TYPE(c.object) != c.type) return false;
    switch (c.kind) {
      case kClass:
        return true;
      case kDict:
        return PyDict_Size(c.object) == c.detail;
      case kList:
        return same_list(c.object, held_[size_t(c.detail)].ptr());
      case kTensor:
        return same_tensor(c.object, tensors_[size_t(c.detail)]);
      case kUnknown:
        break;
    }
    return false;
  }
  void see(PyObject* object) {
    tensors::Tensor t;
    Content c{object, Py_TYPE(object), kClass, -1};
    if (PyDict_Check(object)) {
      c.kind = kDict, c.detail = PyDict_Size(object);
    } else if (PyList_CheckExact(object)) {
      c.kind = kList, c.detail = int64_t(held_.size());
      held_.push_back(py::reinterpret_steal<py::object>(PyList_AsTuple(object)));
    } else if (tensors::readable() && tensors::read(object, t, true)) {
      Seen seen{t.data, reinterpret_cast<const char*>(t.shape), t.type, false, 0};
      seen.counts = version_of(object, seen.version);
      c.kind = kTensor, c.detail = int64_t(tensors_.size());
      tensors_.push_back(seen);
    } else if (PyObject_HasAttrString(object, "data_ptr")) {
      c.kind = kUnknown;
    } else if (!PyType_HasFeature(c.type, Py_TPFLAGS_HEAPTYPE)) {
      return;  // whose class cannot change
    }
    contents_.push_back(c);
  }

  std::vector<Dict> dicts_;
  std::vector<Entry> entries_;  // those of the first dictionary, of the second, ...
  std::vector<Content> contents_;
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
      "What lies in these dictionaries under these names, [(dict, name), ...], or all of them, "
      "[(dict, None), ...].")
      .def(py::init<const py::list&>())
      .def("same", &Watch::same,
           "Whether the same lies there now: classes and tensors unchanged, dictionaries of the "
           "same size, lists "
           "with the same objects.");
}
