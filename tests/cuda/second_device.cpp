// A second device for torch, whose memory is the host's. Every kernel is the CPU's, on aliases of the same memory; but
// tensors of two devices do not mix, numpy does not get at them, and a group normalisation insists on channels first, as
// CUDA's does. What is left behind on the CPU fails here as it would on a card. For tests alone.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
using namespace at;
constexpr auto P1 = DeviceType::PrivateUse1;
static int64_t live = 0;

struct Alloc final : c10::Allocator {
  struct Block { void* data; size_t n; };
  DataPtr allocate(size_t n) override {
    auto* b = new Block{n ? c10::alloc_cpu(n) : nullptr, n};
    live += (int64_t)n;
    return {b->data, b, &drop, Device(P1, 0)};
  }
  static void drop(void* ctx) { auto* b = (Block*)ctx; live -= (int64_t)b->n; if (b->data) c10::free_cpu(b->data); delete b; }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* d, const void* s, size_t n) const override { default_copy_data(d, s, n); }
};
static Alloc alloc_;
REGISTER_ALLOCATOR(P1, &alloc_);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return P1; }
  Device exchangeDevice(Device) const override { return Device(P1, 0); }
  Device getDevice() const override { return Device(P1, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Gen final : CPUGeneratorImpl {
  Gen(DeviceIndex i) : CPUGeneratorImpl(42) { device_ = Device(P1, i < 0 ? 0 : i); key_set_ = DispatchKeySet(c10::DispatchKey::PrivateUse1); }
};
struct Hooks final : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { static Generator g = make_generator<Gen>(0); return g; }
  Generator getNewGenerator(DeviceIndex i) const override { return make_generator<Gen>(i); }
  Device getDeviceFromPtr(void*) const override { return Device(P1, 0); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void resizePrivateUse1Bytes(const Storage& s, size_t n) const override {
    auto data = alloc_.allocate(n);
    if (s.data()) std::memcpy(data.get(), s.data(), std::min(n, s.nbytes()));
    const_cast<Storage&>(s).set_data_ptr(std::move(data)); s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

static Tensor empty_memory(IntArrayRef size, std::optional<ScalarType> dt, std::optional<Layout>, std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> mf) {
  return at::detail::empty_generic(size, &alloc_, DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype_or_default(dt), mf);
}
static Tensor empty_strided_op(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dt, std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &alloc_, DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype_or_default(dt));
}
// The same memory as a CPU tensor.
static Tensor as_cpu(const Tensor& t) {
  if (!t.defined() || t.device().type() != P1) return t;
  if (!t.storage() || t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), t.options().device(kCPU));
  auto r = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t.storage()](void*) {}, t.options().device(kCPU).requires_grad(false), Device(kCPU));
  return r;
}
static Tensor copy_from(const Tensor& self, const Tensor& dst, bool) {
  NoGradGuard g; at::AutoDispatchBelowADInplaceOrView h; as_cpu(dst).copy_(as_cpu(self)); return dst;
}
static Tensor copy_from_resize(const Tensor& self, const Tensor& dst) {
  if (dst.sizes() != self.sizes()) const_cast<Tensor&>(dst).resize_(self.sizes());
  return copy_from(self, dst, false);
}
static Scalar item(const Tensor& self) { return as_cpu(self).item(); }
static const Tensor& resize_op(const Tensor& self, SymIntArrayRef size, std::optional<MemoryFormat>) {
  auto s = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  int64_t n = c10::multiply_integers(s) * (int64_t)self.itemsize() + self.storage_offset() * (int64_t)self.itemsize();
  if ((size_t)n > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), n);
  impl->set_sizes_contiguous(s);
  return self;
}
static Tensor& set_storage(Tensor& r, Storage src, int64_t off, IntArrayRef size, IntArrayRef stride) { return at::cpu::set_(r, src, off, size, stride); }
static Tensor& set_tensor(Tensor& r, const Tensor& s) { r.unsafeGetTensorImpl()->set_storage_and_dtype(s.storage(), s.dtype()); r.unsafeGetTensorImpl()->set_sizes_and_strides(s.sizes(), s.strides(), s.storage_offset()); return r; }
static Tensor& set_storage_only(Tensor& r, Storage src) { int64_t n = src.nbytes() / r.itemsize(); return at::cpu::set_(r, src, 0, {n}, {1}); }

static void check(const Tensor& t, const c10::OperatorHandle& op, bool strict) {
  if (!t.defined() || !strict) return;
  TORCH_CHECK(t.device().type() == P1 || t.dim() == 0, "Expected all tensors to be on the same device, but ", op.schema().name(), " got a ", t.device(), " tensor of ", t.sizes());
}
static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto args = torch::jit::last(*stack, op.schema().arguments().size());
  auto name = op.schema().name();
  const bool lax = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  for (size_t i = 0; i < args.size(); ++i) {
    auto& v = const_cast<IValue&>(args[i]);
    if (v.isTensor()) check(v.toTensor(), op, true);
    else if (v.isTensorList()) for (auto& t : v.toTensorVector()) check(t, op, !lax);
    else if (v.isOptionalTensorList()) for (auto t : v.toOptionalTensorList()) if (auto o = std::optional<Tensor>(t)) check(*o, op, !lax);
    if (v.isGenerator()) {
      auto g = v.toGenerator();
      if (g.defined() && g.device().type() == P1) v = IValue(make_generator<CPUGeneratorImpl>(g.current_seed()));
    }
  }
  // Zero copy: every argument becomes a CPU alias of the same memory.
  const auto n = op.schema().arguments().size();
  const size_t begin = stack->size() - n;
  std::vector<std::pair<Tensor, Tensor>> seen;  // (ours, alias)
  auto down = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || t.device().type() != P1) return t;
    for (auto& [o, a] : seen) if (o.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return a;
    auto a = as_cpu(t.detach()); seen.emplace_back(t, a); return a;
  };
  auto up = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || t.device().type() != DeviceType::CPU) return t;
    for (auto& [o, a] : seen) if (a.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) {
      if (o.sizes() != t.sizes() || (t.numel() && o.numel() && o.data_ptr() != t.data_ptr())) { // an out= that was resized
        const_cast<Tensor&>(o).resize_(t.sizes()); as_cpu(o).copy_(t);
      }
      return o;
    }
    auto r = empty_strided_op(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
    if (t.numel()) as_cpu(r).copy_(t);
    return r;
  };
  for (size_t i = 0; i < n; ++i) {
    IValue& v = (*stack)[begin + i];
    if (v.isTensor() && !v.toTensor().defined() && op.schema().arguments()[i].type()->kind() == c10::TypeKind::OptionalType) v = IValue();
    else if (v.isTensor()) v = down(v.toTensor());
    else if (v.isTensorList()) { c10::List<Tensor> l; for (auto& t : v.toTensorVector()) l.push_back(down(t)); v = l; }
    else if (v.isOptionalTensorList()) { c10::List<std::optional<Tensor>> l; for (std::optional<Tensor> t : v.toOptionalTensorList()) l.push_back(t && t->defined() ? std::optional<Tensor>(down(*t)) : t); v = l; }
    else if (v.isDevice() && v.toDevice().type() == P1) v = Device(kCPU);
  }
  op.redispatchBoxed(DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto m = op.schema().returns().size();
  for (size_t i = stack->size() - m; i < stack->size(); ++i) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) v = up(v.toTensor());
    else if (v.isTensorList()) { c10::List<Tensor> l; for (auto& t : v.toTensorVector()) l.push_back(up(t)); v = l; }
  }
}
static Tensor conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, IntArrayRef s, IntArrayRef p, IntArrayRef d, bool t, IntArrayRef op_, int64_t g) {
  check(x, *c10::Dispatcher::singleton().findSchema({"aten::convolution_overrideable", ""}), true);
  TORCH_CHECK(w.device() == x.device(), "Expected all tensors to be on the same device");
  auto r = at::convolution(as_cpu(x.detach()), as_cpu(w.detach()), b && b->defined() ? std::optional<Tensor>(as_cpu(b->detach())) : std::nullopt, s, p, d, t, op_, g);
  auto o = empty_strided_op(r.sizes(), r.strides(), r.scalar_type(), {}, {}, {}); as_cpu(o).copy_(r); return o;
}
static std::tuple<Tensor, Tensor, Tensor> conv_back(const Tensor& gr, const Tensor& x, const Tensor& w, IntArrayRef s, IntArrayRef p, IntArrayRef d, bool t, IntArrayRef op_, int64_t g, std::array<bool, 3> mask) {
  TORCH_CHECK(w.device() == x.device() && gr.device() == x.device(), "Expected all tensors to be on the same device");
  std::vector<int64_t> bs{gr.size(1)};
  auto [a, b, c] = at::convolution_backward(as_cpu(gr.detach()), as_cpu(x.detach()), as_cpu(w.detach()), bs, s, p, d, t, op_, g, mask);
  auto up = [](const Tensor& q) { if (!q.defined()) return q; auto o = empty_strided_op(q.sizes(), q.strides(), q.scalar_type(), {}, {}, {}); as_cpu(o).copy_(q); return o; };
  return {up(a), up(b), up(c)};
}
static std::tuple<Tensor, Tensor, Tensor> gnorm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b, int64_t n, int64_t c, int64_t hw, int64_t g, double e) {
  TORCH_CHECK(x.device().type() == P1 && x.is_contiguous(), "X.is_contiguous(memory_format) INTERNAL, as on CUDA");
  auto f = [](const std::optional<Tensor>& q) { return q && q->defined() ? std::optional<Tensor>(as_cpu(q->detach())) : std::nullopt; };
  auto [a, m2, r] = at::native_group_norm(as_cpu(x.detach()), f(w), f(b), n, c, hw, g, e);
  auto up = [](const Tensor& q) { auto o = empty_strided_op(q.sizes(), q.strides(), q.scalar_type(), {}, {}, {}); as_cpu(o).copy_(q); return o; };
  return {up(a), up(m2), up(r)};
}
static std::tuple<Tensor, Tensor, Tensor> gnorm_back(const Tensor& dy, const Tensor& x, const Tensor& m_, const Tensor& r_, const std::optional<Tensor>& w, int64_t n, int64_t c, int64_t hw, int64_t g, std::array<bool, 3> mask) {
  TORCH_CHECK(x.device().type() == P1 && dy.device() == x.device() && x.is_contiguous() && dy.is_contiguous(), "contiguous, as on CUDA");
  auto f = [](const std::optional<Tensor>& q) { return q && q->defined() ? std::optional<Tensor>(as_cpu(q->detach())) : std::nullopt; };
  auto [a, b, d] = at::native_group_norm_backward(as_cpu(dy.detach()), as_cpu(x.detach()), as_cpu(m_.detach()), as_cpu(r_.detach()), f(w), n, c, hw, g, mask);
  auto up = [](const Tensor& q) { if (!q.defined()) return q; auto o = empty_strided_op(q.sizes(), q.strides(), q.scalar_type(), {}, {}, {}); as_cpu(o).copy_(q); return o; };
  return {up(a), up(b), up(d)};
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("native_group_norm", &gnorm);
  m.impl("native_group_norm_backward", &gnorm_back);
  m.impl("empty.memory_format", &empty_memory);
  m.impl("empty_strided", &empty_strided_op);
  m.impl("as_strided", [](const Tensor& s, IntArrayRef a, IntArrayRef b, std::optional<int64_t> o) { return at::cpu::as_strided(s, a, b, o); });
  m.impl("view", [](const Tensor& s, IntArrayRef a) { return at::cpu::view(s, a); });
  m.impl("unfold", [](const Tensor& s, int64_t a, int64_t b, int64_t c) { return at::cpu::unfold(s, a, b, c); });
  m.impl("_reshape_alias", [](const Tensor& s, IntArrayRef a, IntArrayRef b) { return at::cpu::_reshape_alias(s, a, b); });
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_op);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_storage_only);
  m.impl("convolution_overrideable", &conv);
  m.impl("convolution_backward_overrideable", &conv_back);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks; RegisterPrivateUse1HooksInterface(&hooks);
  m.def("allocated", [] { return live; });
  m.def("generator", [] { return hooks.getDefaultGenerator(0); });
}
