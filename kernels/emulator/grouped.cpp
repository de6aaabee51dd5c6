// Runs the grouped GEMM on the CPU: its launchers, behind a C function that the tests call.
//   g++ -std=c++17 -O1 -ffp-contract=off -DDVDQ_EMULATE -shared -fPIC grouped.cpp
//
// Every input is copied to the very end of readable memory, so that a read behind it is a fault, which is reported.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../csrc/mma_grouped.cu"

namespace dvdq {
namespace {

char text[512];
sigjmp_buf escape;

void on_fault(int) { siglongjmp(escape, 1); }

// A copy that ends where an unreadable page begins.
class Guarded {
 public:
  Guarded(const void* data, int64_t bytes) {
    if (data == nullptr) return;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = (static_cast<size_t>(bytes) + page - 1) / page * page;
    size_ = pages + page;
    base_ =
        static_cast<unsigned char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + pages, page, PROT_NONE) != 0) emulator::stop("no guarded memory");
    data_ = base_ + pages - bytes;
    memcpy(data_, data, static_cast<size_t>(bytes));
  }
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, size_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  const T* get() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  unsigned char* base_ = nullptr;
  unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

dvdq_status fail(dvdq_status status, const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  return status;
}

dvdq_status check_cuda(int error, const char* what) { return error == 0 ? DVDQ_OK : fail(DVDQ_CUDA_ERROR, "%s", what); }

}  // namespace dvdq

extern "C" {

// bits: 4 or 8. sizes: m, n, k, act_group, weight_groups, float_zero_point, dtype, sm. schedule: order of threads.
// A dvdq_status, or -1 where the kernel read what it was not given.
DVDQ_API int run_grouped(int bits, const int64_t* sizes, const void* codes, const float* scales, const float* sums,
                         const void* weight, const float* row_scale, const float* row_zero, const float* bias,
                         const uint8_t* group_scale, const void* group_zero, void* y, uint64_t schedule) {
  using dvdq::Guarded;
  const int64_t m = sizes[0], n = sizes[1], k = sizes[2], weight_groups = sizes[4];
  const int64_t row = k * bits / 8, groups = sizes[3] > 0 ? k / sizes[3] : 1;
  const Guarded a(codes, m * row), b(weight, n * row), s(scales, groups * m * 4), t(sums, groups * m * 4);
  const Guarded step(row_scale, n * 4), zero(row_zero, n * 4), add(bias, n * 4);
  const Guarded f(group_scale, n * weight_groups), z(group_zero, n * weight_groups);
  dvdq::GemmArgs args{};
  args.codes = a.get<void>(), args.weight = b.get<void>(), args.scales = s.get<float>(), args.sums = t.get<float>();
  args.row_scale = step.get<float>(), args.row_zero = zero.get<float>(), args.bias = add.get<float>();
  args.group_scale = f.get<uint8_t>(), args.group_zero = z.get<void>(), args.y = y;
  args.m = m, args.n = n, args.k = k, args.act_group = static_cast<int32_t>(sizes[3]);
  args.weight_groups = weight_groups, args.float_zero_point = sizes[5] != 0, args.dtype = static_cast<dvdq_dtype>(sizes[6]);
  args.sm = static_cast<int>(sizes[7]);
  dvdq::emulator::set_schedule(schedule);

  struct sigaction fault {
  }, before{};
  fault.sa_handler = dvdq::on_fault;
  sigaction(SIGSEGV, &fault, &before);
  volatile int status = -1;  // kept over the jump
  if (sigsetjmp(dvdq::escape, 1) == 0) {
    status = bits == 4 ? dvdq::grouped_s4(args) : dvdq::grouped_s8(args);
  } else {
    dvdq::fail(DVDQ_CUDA_ERROR, "the kernel read behind one of its inputs");
  }
  sigaction(SIGSEGV, &before, nullptr);
  return status;
}

DVDQ_API const char* grouped_error() { return dvdq::text; }
}
