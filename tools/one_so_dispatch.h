// Force-included into the generated rosidl_typesupport_c sources: find the concrete type support (fastrtps_c or
// introspection_c) inside this shared object, instead of dlopen()ing lib<package>__<typesupport>.so from
// LD_LIBRARY_PATH as the stock dispatcher does.
#pragma once
#include <dlfcn.h>
#include <string.h>

#include "rosidl_runtime_c/message_type_support_struct.h"
#include "rosidl_runtime_c/service_type_support_struct.h"
#include "rosidl_typesupport_c/identifier.h"
#include "rosidl_typesupport_c/message_type_support_dispatch.h"
#include "rosidl_typesupport_c/service_type_support_dispatch.h"
#include "rosidl_typesupport_c/type_support_map.h"

// Static: a process may hold several packages built this way, each must look into its own shared object.
template<typename TypeSupport>
static const TypeSupport * one_so_dispatch(const TypeSupport * handle, const char * identifier)
{
  if (strcmp(handle->typesupport_identifier, identifier) == 0) {
    return handle;
  }
  if (strcmp(handle->typesupport_identifier, rosidl_typesupport_c__typesupport_identifier) != 0) {
    return nullptr;
  }
  auto * map = static_cast<const type_support_map_t *>(handle->data);
  for (size_t i = 0; i < map->size; ++i) {
    if (strcmp(map->typesupport_identifier[i], identifier) != 0) {
      continue;
    }
    static void * self = [] {
      Dl_info info;
      return dladdr(reinterpret_cast<void *>(&one_so_dispatch<TypeSupport>), &info) ?
             dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    }();
    auto get = reinterpret_cast<const TypeSupport * (*)()>(self ? dlsym(self, map->symbol_name[i]) : nullptr);
    return get ? get() : nullptr;
  }
  return nullptr;
}

#define rosidl_typesupport_c__get_message_typesupport_handle_function one_so_dispatch<rosidl_message_type_support_t>
#define rosidl_typesupport_c__get_service_typesupport_handle_function one_so_dispatch<rosidl_service_type_support_t>
