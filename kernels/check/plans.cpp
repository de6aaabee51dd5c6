// Asks a kernel library how it runs layers, without a device: a program for machines without Python, or under an emulator.
//
//   plans LIBRARY [SM N K GROUPS FLOAT_ZERO BLOCK OUTER ACT_BITS ACT_GROUP]...
//
// One line of JSON for the library, and one for each layer: [path, prepared bytes, workspace bytes of 1000 tokens, and
// of a weight that stays packed the bytes of its rows and of that workspace], or the words of its refusal.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "dvdquant/kernels.h"

namespace {

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) {
    fprintf(stderr, "the library has no %s\n", name);
    exit(2);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count < 2 || (count - 2) % 9) {
    fprintf(stderr, "usage: plans LIBRARY [SM N K GROUPS FLOAT_ZERO BLOCK OUTER ACT_BITS ACT_GROUP]...\n");
    return 2;
  }
  void* library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  decltype(dvdq_abi_version)* abi_version;
  decltype(dvdq_architectures)* architectures;
  decltype(dvdq_last_error)* last_error;
  decltype(dvdq_path_name)* path_name;
  decltype(dvdq_plan_layer)* plan_layer;
  decltype(dvdq_workspace_bytes)* workspace_bytes;
  decltype(dvdq_rows_bytes)* rows_bytes;
  decltype(dvdq_packed_workspace_bytes)* packed_workspace_bytes;
  find(library, "dvdq_rows_bytes", rows_bytes);
  find(library, "dvdq_packed_workspace_bytes", packed_workspace_bytes);
  find(library, "dvdq_abi_version", abi_version);
  find(library, "dvdq_architectures", architectures);
  find(library, "dvdq_last_error", last_error);
  find(library, "dvdq_path_name", path_name);
  find(library, "dvdq_plan_layer", plan_layer);
  find(library, "dvdq_workspace_bytes", workspace_bytes);
  printf("{\"abi\": %d, \"architectures\": \"%s\"}\n", abi_version(), architectures());
  for (int at = 2; at < count; at += 9) {
    long long value[9];
    for (int i = 0; i < 9; ++i) value[i] = atoll(words[at + i]);
    const int32_t sm = static_cast<int32_t>(value[0]);
    dvdq_layer layer{};
    layer.n = value[1];
    layer.k = value[2];
    layer.weight_groups = value[3];
    layer.float_zero_point = static_cast<int32_t>(value[4]);
    layer.block = static_cast<int32_t>(value[5]);
    layer.outer = static_cast<int32_t>(value[6]);
    layer.act_bits = static_cast<int32_t>(value[7]);
    layer.act_group = static_cast<int32_t>(value[8]);
    layer.dtype = DVDQ_BF16;
    dvdq_plan plan;
    int64_t workspace = 0, rows = 0, packed = 0;
    if (plan_layer(&layer, sm, &plan) != DVDQ_OK || workspace_bytes(&layer, sm, 1000, &workspace) != DVDQ_OK ||
        rows_bytes(&layer, sm, &rows) != DVDQ_OK || packed_workspace_bytes(&layer, sm, 1000, &packed) != DVDQ_OK) {
      printf("\"%s\"\n", last_error());
      continue;
    }
    // The Python binding has these names in lower case.
    char name[32];
    int length = 0;
    for (const char* c = path_name(plan.path); *c != '\0' && length < 31; ++c)
      name[length++] = static_cast<char>(*c >= 'A' && *c <= 'Z' ? *c + 32 : *c);
    name[length] = '\0';
    printf("[\"%s\", %lld, %lld, %lld, %lld]\n", name, static_cast<long long>(plan.prepared_bytes),
           static_cast<long long>(workspace), static_cast<long long>(rows), static_cast<long long>(packed));
  }
  return 0;
}
