/* host_rows.h: the rows of the table, and what the files that hold them offer to one another and to those on top. */
#ifndef KVORTEX_HOST_ROWS_H
#define KVORTEX_HOST_ROWS_H

#include "host_gate.h"

/* One function per row of the table. */
#define KV_ROW_FUNCTION(field, symbol, version, parameters) kv_result kv_host_##field parameters;
KV_DRIVER_ROWS(KV_ROW_FUNCTION)
#undef KV_ROW_FUNCTION

/* The end of a context (`reap`) answers how many objects were alive. */

/* host_event.c */
size_t kv_host_streams_reap(int ordinal);
size_t kv_host_events_reap(int ordinal);
size_t kv_host_events_live(void);

/* host_pool.c */
void kv_host_pools_settle(int ordinal); /* after a wait: frees that are over count, thresholds are honoured */
size_t kv_host_pools_reap(int ordinal);
size_t kv_host_pools_live(void);

/* host_space.c */
size_t kv_host_spaces_reap(int ordinal);
size_t kv_host_spaces_live(void);
size_t kv_host_physical_live(void);

#endif
