/* CUDA devices for PyTorch where there are none: memory, copies, streams and events work, kernels
 * do nothing. Preloaded (LD_PRELOAD), it answers the calls that PyTorch 2.12 makes of CUDA 13's
 * runtime and driver, cuBLAS and NCCL; cuDNN must be switched off.
 *
 * - Device memory is fresh zeros, never handed out twice: with PYTORCH_NO_CUDA_MEMORY_CACHING=1
 *   every tensor that a kernel should have written reads as zero.
 * - A copy from a device into pinned memory arrives when the host has waited for it and not before:
 *   until then the memory holds 0xFF bytes, which read as NaN.
 * - Collectives exchange what the ranks hold, and end a process that calls another than its peers.
 * - Waits of the host, copies to and from it, and collectives are told to a listener.
 *
 * Functions leave out trailing arguments that they do not look at; calling conventions allow it.
 */
#include <driver_types.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK(name) int name(void) { return cudaSuccess; }

static void (*listener)(const char *what, long amount);
void fake_cuda_listen(void (*function)(const char *, long)) { listener = function; }
static void tell(const char *what, long amount) { if (listener) listener(what, amount); }

/* ---------------------------------------------------------------- devices */
enum { DEVICES = 2 };
static __thread int device;

int cudaGetDeviceCount(int *count) { *count = DEVICES; return cudaSuccess; }
int cudaGetDevice(int *current) { *current = device; return cudaSuccess; }
int cudaSetDevice(int chosen) {
  if (chosen < 0 || chosen >= DEVICES) return cudaErrorInvalidDevice;
  device = chosen;
  return cudaSuccess;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -1;
  return cudaSuccess;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int which) { /* an H100's, as far as read */
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fake");
  p->uuid.bytes[0] = which;
  p->pciBusID = which;
  p->major = 9;
  p->totalGlobalMem = 80ull << 30;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = 232448;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
int cudaDeviceGetAttribute(int *value, int attribute) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  *value = attribute == cudaDevAttrMultiProcessorCount           ? p.multiProcessorCount
           : attribute == cudaDevAttrMaxThreadsPerBlock          ? p.maxThreadsPerBlock
           : attribute == cudaDevAttrMaxThreadsPerMultiProcessor ? p.maxThreadsPerMultiProcessor
           : attribute == cudaDevAttrWarpSize                    ? p.warpSize
                                                                 : 0;
  return cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int which, unsigned *flags, int *active) {
  (void)which;
  *flags = 0;
  *active = 1;
  return cudaSuccess;
}
int cuCtxGetCurrent(void **context) { *context = &device; return cudaSuccess; }
OK(cudaGetLastError) OK(cudaPeekAtLastError) OK(cudaThreadExchangeStreamCaptureMode)

/* ---------------------------------------------------------------- memory */
/* One range of addresses for pinned memory (0) and for each device (1 + device). The page before a
 * block holds its length. */
#define ARENA (1ul << 40)
#define PAGE 4096ul
static char *arenas[1 + DEVICES];
static atomic_ulong used[1 + DEVICES];

__attribute__((constructor)) static void reserve(void) {
  int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  for (int i = 0; i <= DEVICES; i++) {
    arenas[i] = mmap(0, ARENA, access, kind, -1, 0);
    if (arenas[i] == MAP_FAILED) perror("fake_cuda: cannot reserve addresses"), abort();
  }
}
static int arena_of(const void *address) { /* -1: pageable memory */
  for (int i = 0; i <= DEVICES; i++)
    if ((char *)address >= arenas[i] && (char *)address < arenas[i] + ARENA) return i;
  return -1;
}
static unsigned long room(size_t size) { return PAGE + (size + PAGE - 1) / PAGE * PAGE; }
static int take(void **address, size_t size, int arena) {
  unsigned long start = atomic_fetch_add(&used[arena], room(size));
  if (start + room(size) > ARENA) return cudaErrorMemoryAllocation;
  *(size_t *)(arenas[arena] + start) = size;
  *address = arenas[arena] + start + PAGE;
  return cudaSuccess;
}
static int give_back(void *address) {
  if (!address) return cudaSuccess;
  char *block = (char *)address - PAGE;
  madvise(block, room(*(size_t *)block), MADV_DONTNEED);
  return cudaSuccess;
}
int cudaMalloc(void **address, size_t size) { return take(address, size, 1 + device); }
int cudaFree(void *address) { return give_back(address); }
int cudaHostAlloc(void **address, size_t size) { return take(address, size, 0); }
int cudaFreeHost(void *address) { return give_back(address); }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 80ul << 30; return cudaSuccess; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  int arena = arena_of(address);
  memset(a, 0, sizeof *a);
  a->type = arena > 0    ? cudaMemoryTypeDevice
            : arena == 0 ? cudaMemoryTypeHost
                         : cudaMemoryTypeUnregistered;
  a->device = arena > 0 ? arena - 1 : 0;
  a->devicePointer = (void *)address;
  a->hostPointer = arena > 0 ? 0 : (void *)address;
  return cudaSuccess;
}

/* ---------------------------------------------------------------- streams, events, copies */
/* A stream keeps what the host has not waited for: copies into pinned memory, and other streams'
 * work up to an event. Its tickets count them. */
typedef struct Work Work;
typedef struct Stream { int device; long ticket; Work *first, **end; struct Stream *next; } Stream;
typedef struct { int device; long ticket; Stream *stream; } Event;
struct Work {
  Work *next;
  long ticket;
  Event after;
  void *to;
  size_t size;
  char bytes[];
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Stream default_streams[DEVICES] = {{.next = &default_streams[1]}, {.device = 1}};

static Stream *stream_of(void *handle) { /* 0, 1, 2: the default stream by its three names */
  return (size_t)handle > 2 ? handle : &default_streams[device];
}
static Work *add_work(Stream *stream, size_t size) {
  Work *work = calloc(1, sizeof *work + size);
  work->ticket = ++stream->ticket;
  work->size = size;
  if (!stream->first) stream->end = &stream->first;
  *stream->end = work;
  stream->end = &work->next;
  return work;
}
static void finish(Stream *stream, long ticket) {
  while (stream && stream->first && stream->first->ticket <= ticket) {
    Work *work = stream->first;
    stream->first = work->next;
    if (work->to) memcpy(work->to, work->bytes, work->size);
    else finish(work->after.stream, work->after.ticket);
    free(work);
  }
}
static int finish_locked(Stream *stream, long ticket) {
  pthread_mutex_lock(&lock);
  finish(stream, ticket);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

int cudaStreamCreateWithPriority(void **handle) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->device = device;
  pthread_mutex_lock(&lock);
  stream->next = default_streams[1].next;
  default_streams[1].next = stream;
  pthread_mutex_unlock(&lock);
  *handle = stream;
  return cudaSuccess;
}
int cudaStreamQuery(void *handle) {
  return finish_locked(stream_of(handle), stream_of(handle)->ticket);
}
int cudaStreamSynchronize(void *handle) {
  tell("wait for a stream", 0);
  return cudaStreamQuery(handle);
}
int cudaDeviceSynchronize(void) {
  tell("wait for a device", 0);
  for (Stream *stream = default_streams; stream; stream = stream->next)
    if (stream->device == device) cudaStreamQuery(stream);
  return cudaSuccess;
}
int cudaStreamGetCaptureInfo(void *handle, int *status) {
  (void)handle;
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
int cudaStreamIsCapturing(void *handle, int *status) {
  return cudaStreamGetCaptureInfo(handle, status);
}

int cudaEventCreateWithFlags(void **handle) {
  Event *event = calloc(1, sizeof *event);
  event->device = device;
  *handle = event;
  return cudaSuccess;
}
int cudaEventDestroy(void *handle) { free(handle); return cudaSuccess; }
int cudaEventRecord(Event *event, void *handle) {
  Stream *stream = stream_of(handle);
  if (stream->device != event->device) return cudaErrorInvalidResourceHandle;
  event->stream = stream;
  event->ticket = stream->ticket;
  return cudaSuccess;
}
int cudaEventRecordWithFlags(Event *event, void *handle) { return cudaEventRecord(event, handle); }
int cudaEventQuery(Event *event) { return finish_locked(event->stream, event->ticket); }
int cudaEventSynchronize(Event *event) {
  tell("wait for an event", 0);
  return cudaEventQuery(event);
}
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 0; return cudaSuccess; }
int cudaStreamWaitEvent(void *handle, Event *event) {
  pthread_mutex_lock(&lock);
  add_work(stream_of(handle), 0)->after = *event;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *handle) {
  (void)kind;
  int target = arena_of(to), source = arena_of(from);
  if (target > 0 && source <= 0)
    tell(source ? "copy pageable to device" : "copy pinned to device", size);
  if (target <= 0 && source > 0)
    tell(target ? "copy device to pageable" : "copy device to pinned", size);
  if (target || source <= 0) {
    memmove(to, from, size);
    return cudaSuccess;
  }
  pthread_mutex_lock(&lock);
  Work *work = add_work(stream_of(handle), size);
  memcpy(work->bytes, from, size);
  work->to = memset(to, 0xFF, size);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
int cudaMemsetAsync(void *to, int value, size_t size) {
  memset(to, value, size);
  return cudaSuccess;
}

/* ---------------------------------------------------------------- kernels, cuBLAS */
OK(cudaLaunchKernel) OK(__cudaLaunchKernel) OK(cudaLaunchKernelExC)
int __cudaGetKernel(const void **kernel, const void *entry) { *kernel = entry; return cudaSuccess; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *a) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  *blocks = 2;
  return cudaSuccess;
}
/* Kernels that PyTorch compiles when it first calls them. */
OK(cuModuleLoadData) OK(cuModuleGetFunction) OK(cuLaunchKernel)

int cublasCreate_v2(void **handle) { *handle = &device; return cudaSuccess; }
int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return cudaSuccess; }
OK(cublasSetMathMode) OK(cublasSetStream_v2) OK(cublasSetWorkspace_v2)
OK(cublasSgemm_v2) OK(cublasGemmEx)

/* ---------------------------------------------------------------- NCCL */
/* A communicator is a file that all ranks map: what each calls, and its values piece by piece. */
enum { RANKS = 8, PIECE = 1 << 16, PATIENCE = 60 /* seconds */ };
enum { MAX = 2, MIN = 3 }; /* ncclRedOp_t */
typedef struct { char name[16]; size_t count; int type, detail; } Call;
typedef struct {
  atomic_long arrived;
  Call calls[RANKS];
  _Alignas(16) char values[RANKS][PIECE];
} Table;
typedef struct { Table *table; int size, rank; long round; } Communicator;
typedef struct { char text[128]; } Id;

static void meet(Communicator *c) { /* returns when all ranks have come this far */
  long all = ++c->round * c->size, tries = PATIENCE * 10000;
  for (atomic_fetch_add(&c->table->arrived, 1); c->table->arrived < all; usleep(100))
    if (!--tries) fprintf(stderr, "fake_cuda: rank %d waits in vain\n", c->rank), abort();
}
int ncclGetVersion(int *version) { *version = 22907; return 0; }
int ncclGetUniqueId(Id *id) {
  static atomic_int number;
  memset(id, 0, sizeof *id);
  snprintf(id->text, sizeof id->text, "/dev/shm/fake_nccl_%d_%d", getpid(), number++);
  return 0;
}
int ncclCommInitRankConfig(Communicator **made, int size, Id id, int rank) {
  Communicator *c = *made = calloc(1, sizeof *c);
  c->size = size;
  c->rank = rank;
  int file = open(id.text, O_CREAT | O_RDWR, 0600);
  if (size > RANKS || file < 0 || ftruncate(file, sizeof(Table))) return 2; /* ncclSystemError */
  c->table = mmap(0, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  meet(c);
  if (!rank) unlink(id.text);
  return 0;
}
int ncclCommGetAsyncError(Communicator *c, int *error) { (void)c; *error = 0; return 0; }
OK(ncclCommDestroy) OK(ncclCommFinalize)

/* a[i] op b[i] -> a[i]; of half precision, which only kernels write, rank 0's stay. */
#define REDUCE(number, Type)                                                                    \
  if (type == number)                                                                           \
    for (size_t i = 0; i < size / sizeof(Type); i++) {                                          \
      Type x = ((Type *)a)[i], y = ((Type *)b)[i];                                              \
      ((Type *)a)[i] = op == MAX ? (x > y ? x : y) : op == MIN ? (x < y ? x : y) : x + y;       \
    }
static void reduce(void *a, const void *b, size_t size, int type, int op) {
  REDUCE(1, unsigned char) REDUCE(2, int) REDUCE(4, long) REDUCE(7, float) REDUCE(8, double)
}
/* detail: the operation of a reduction, the source of a broadcast. */
static int collective(const char *name, const void *from, void *to, size_t count, int type,
                      int detail, Communicator *c) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2}; /* of ncclDataType_t */
  size_t size = count * sizes[type];
  Call call = {.count = count, .type = type, .detail = detail}, *calls = c->table->calls;
  tell(name, count);
  strcpy(call.name, name);
  calls[c->rank] = call;
  meet(c);
  for (int rank = 0; rank < c->size; rank++)
    if (memcmp(&calls[rank], &call, sizeof call)) {
      fprintf(stderr, "fake_cuda: rank %d calls %s of %zu, rank %d %s of %zu\n", c->rank, name,
              count, rank, calls[rank].name, calls[rank].count);
      abort();
    }
  for (size_t start = 0; start < size; start += PIECE) {
    size_t piece = size - start < PIECE ? size - start : PIECE;
    char *target = (char *)to + start;
    memcpy(c->table->values[c->rank], (char *)from + start, piece);
    meet(c);
    if (*name == 'b') memcpy(target, c->table->values[detail], piece);
    else
      for (int rank = 0; rank < c->size; rank++)
        if (name[4] == 'g') memcpy(target + rank * size, c->table->values[rank], piece);
        else if (!rank) memcpy(target, c->table->values[0], piece);
        else reduce(target, c->table->values[rank], piece, type, detail);
    meet(c);
  }
  return 0;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Communicator *c) {
  return collective("all_reduce", from, to, count, type, op, c);
}
int ncclBcast(void *values, size_t count, int type, int root, Communicator *c) {
  return collective("broadcast", values, values, count, type, root, c);
}
int ncclAllGather(const void *from, void *to, size_t count, int type, Communicator *c) {
  return collective("all_gather", from, to, count, type, 0, c);
}
