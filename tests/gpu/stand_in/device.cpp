// A GPU for machines without one: device "cuda" whose memory is the host's and whose kernels are the CPU's.
//
// What it shows: that each tensor is where the code takes it to be (a CPU tensor in an operation
// with one on the device is an error here as it is there), that copies are made and by way of
// pinned memory, and that streams and events are used as torch's interface wants them. What it
// can't show: anything that depends on time, since here each operation has ended when it returns,
// and whatever a GPU's own kernels do.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <chrono>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

using c10::IValue;
const at::Device kCard(at::DeviceType::CUDA, 0);

// -- memory ---------------------------------------------------------------------------

void* room(size_t size) {
  void* found = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
  TORCH_CHECK(found || !size, "out of memory");
  return found;
}

struct CardMemory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* found = room(size);
    return {found, found, &std::free, kCard};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

void unpin(void* where) {
  {
    std::lock_guard<std::mutex> hold(pinned_mutex);
    pinned.erase(static_cast<const char*>(where));
  }
  std::free(where);
}

struct PinnedMemory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* found = room(size);
    std::lock_guard<std::mutex> hold(pinned_mutex);
    if (found) pinned[static_cast<const char*>(found)] = size;
    return {found, found, &unpin, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

CardMemory card_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(at::DeviceType::CUDA, &card_memory)

// -- streams and events: all is done when it is asked for ------------------------------

using Moment = std::chrono::steady_clock::time_point;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kCard); }
  at::DeviceType type() const override { return at::DeviceType::CUDA; }
  at::Device exchangeDevice(at::Device) const override { return kCard; }
  at::Device getDevice() const override { return kCard; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return stream(); }
  c10::Stream getDefaultStream(at::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(at::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(at::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const at::DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, const at::DeviceIndex, const c10::EventFlag)
      const override {
    if (!*event) *event = new Moment;
    *static_cast<Moment*>(*event) = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const at::DeviceIndex) const noexcept override {
    delete static_cast<Moment*>(event);
  }
  double elapsedTime(void* from, void* to, const at::DeviceIndex) const override {
    auto took = *static_cast<Moment*>(to) - *static_cast<Moment*>(from);
    return std::chrono::duration<double, std::milli>(took).count();
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* where) const override {
    std::lock_guard<std::mutex> hold(pinned_mutex);
    auto next = pinned.upper_bound(static_cast<const char*>(where));
    if (next == pinned.begin()) return false;
    --next;
    return where < next->first + next->second;
  }
};
// DistributedDataParallel measures itself.
struct CardTimer final : c10d::Timer {
  explicit CardTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event from, Event to) override {
    auto begin = getTimestamp(from), end = getTimestamp(to);
    return begin && end ? std::optional<int64_t>(*end - *begin) : std::nullopt;
  }
};

}  // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, CardTimer)
}

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

namespace {

// -- operations -------------------------------------------------------------------------

// A tensor over existing memory, with `like`'s sizes and strides.
at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

void let_go(void* storage) { delete static_cast<c10::Storage*>(storage); }

// One operation's tensors on the device, as the CPU's kernels may have them.
struct Crossing {
  std::unordered_map<c10::StorageImpl*, c10::Storage> there;  // device -> host, the same bytes
  std::unordered_map<c10::StorageImpl*, c10::Storage> back;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // device, host
  bool stranger = false;  // a tensor on the CPU that is no scalar

  at::Tensor to_host(const at::Tensor& given) {
    if (!given.defined()) return given;
    if (!given.is_cuda()) {
      stranger |= given.is_cpu() && given.dim() > 0;
      return given;
    }
    auto& host = there[given.storage().unsafeGetStorageImpl()];
    if (!host) {
      // Whoever works on in the background, like gloo, keeps the device's memory alive.
      auto* held = new c10::Storage(given.storage());
      at::DataPtr data(held->mutable_data(), held, &let_go, at::Device(at::kCPU));
      host = c10::Storage(
          c10::Storage::use_byte_size_t(), given.storage().nbytes(), std::move(data),
          c10::GetAllocator(at::DeviceType::CPU), true);
      back[host.unsafeGetStorageImpl()] = given.storage();
    }
    auto alias = over(host, c10::DispatchKey::CPU, given);
    pairs.emplace_back(given, alias);
    return alias;
  }

  at::Tensor to_card(const at::Tensor& made) {
    if (!made.defined() || !made.is_cpu()) return made;
    for (auto& [card, host] : pairs)
      if (made.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return card;
    auto known = back.find(made.storage().unsafeGetStorageImpl());
    if (known != back.end()) return over(known->second, c10::DispatchKey::CUDA, made);
    auto* held = new c10::Storage(made.storage());  // nobody else has it: the card takes it over
    at::DataPtr data(held->mutable_data(), held, &let_go, kCard);
    c10::Storage own(
        c10::Storage::use_byte_size_t(), held->nbytes(), std::move(data), &card_memory, true);
    auto moved = at::detail::make_tensor<c10::TensorImpl>(
        std::move(own), c10::DispatchKeySet(c10::DispatchKey::CUDA), made.dtype());
    moved.unsafeGetTensorImpl()->set_sizes_and_strides(
        made.sizes(), made.strides(), made.storage_offset());
    return moved;
  }

  // What the kernel did to the alias's own shape and room: transpose_, or an `out=` that grew.
  void follow() {
    for (auto& [device, host] : there)
      if (host.data() != device->data()) {
        auto data = card_memory.allocate(host.nbytes());
        if (host.nbytes()) std::memcpy(data.get(), host.data(), host.nbytes());
        device->set_data_ptr_noswap(std::move(data));
        device->set_nbytes(host.nbytes());
      }
    for (auto& [card, host] : pairs)
      if (card.sizes() != host.sizes() || card.strides() != host.strides())
        card.unsafeGetTensorImpl()->set_sizes_and_strides(
            host.sizes(), host.strides(), host.storage_offset());
  }
};

template <class Change>
IValue changed(const IValue& given, Change change) {
  if (given.isTensor()) return change(given.toTensor());
  if (given.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& each : given.toTensorVector()) list.push_back(change(each));
    return list;
  }
  if (given.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& each : given.toOptionalTensorVector())
      list.push_back(each ? std::optional<at::Tensor>(change(*each)) : std::nullopt);
    return list;
  }
  if (given.isList()) {  // a list of lists of tensors, as c10d has them
    auto list = c10::impl::GenericList(given.toList().elementType());
    for (const IValue& each : given.toListRef()) list.push_back(changed(each, change));
    return list;
  }
  return given;
}

// Operations that a GPU, too, takes tensors from both sides for.
bool crosses(const std::string& name) {
  return name == "aten::copy_" || name.rfind("aten::index", 0) == 0 ||
      name.rfind("aten::_index", 0) == 0;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Crossing crossing;
  const auto& schema = op.schema();
  const size_t taken = schema.arguments().size(), given_back = schema.returns().size();
  for (size_t i = 0; i < taken; ++i) {
    auto& given = torch::jit::peek(*stack, i, taken);
    given = changed(given, [&](const at::Tensor& t) { return crossing.to_host(t); });
    if (given.isDevice() && given.toDevice().is_cuda()) given = at::Device(at::kCPU);
  }
  TORCH_CHECK(
      !crossing.stranger || crossing.pairs.empty() || crosses(schema.name()),
      schema.name(), ": expected all tensors to be on the same device, but found cuda:0 and cpu");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  crossing.follow();
  for (size_t i = 0; i < given_back; ++i) {
    auto& made = torch::jit::peek(*stack, i, given_back);
    made = changed(made, [&](const at::Tensor& t) { return crossing.to_card(t); });
  }
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &card_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &card_memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto wanted = at::detail::computeStorageNbytesContiguous(
      sizes, self.element_size(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (wanted > storage->nbytes()) {
    auto data = card_memory.allocate(wanted);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(wanted);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

void record_stream(at::Tensor&, c10::Stream) {}

// Of scaled_dot_product_attention's ways, the one that is made of other operations.
int64_t plain_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", plain_attention);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

// gloo reaches the device's memory as it does the host's.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {"allreduce_", "broadcast_", "alltoall_base_", "_allgather_base_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

}  // namespace
