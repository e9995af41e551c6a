// What Go calls in batch.c. The bounds of every buffer travel with it.
#ifndef OVERKEEP_BATCH_H
#define OVERKEEP_BATCH_H

#include <stdint.h>

// From SQLite's C interface (sqlite.org/c3ref), the part used here: its header lies in
// another module, out of reach of this one.
typedef struct sqlite3 sqlite3;
typedef struct sqlite3_stmt sqlite3_stmt;

// A value of a row. The type is SQLite's (1 integer, 2 float, 3 text, 4 blob,
// 5 null). For a text, i is its offset in the text buffer; of what is longer than
// the bound only the length is told, as type 6.
typedef struct {
	int64_t i;
	uint32_t len;
	uint32_t type;
} ok_cell;

enum { OK_TOO_LONG = 6 };

int ok_open(const char *uri, int busy_ms, sqlite3 **db);
int ok_prepare(sqlite3 *db, const char *sql, int len, int columns, sqlite3_stmt **stmt);
int ok_bind_int(sqlite3_stmt *stmt, int n, int64_t v);
int ok_bind_text(sqlite3_stmt *stmt, int n, const char *text, int len);
int ok_rows(sqlite3_stmt *stmt, int columns, int longest, ok_cell *cells, int max_rows,
	char *text, int text_cap, int *pending, int *rows);
int ok_pairs(sqlite3_stmt *stmt, int64_t *pairs, int max_pairs, int *pairs_read, int *wrong);
const char *ok_message(sqlite3 *db);
int ok_reset(sqlite3_stmt *stmt);
void ok_finalize(sqlite3_stmt *stmt);
int ok_close(sqlite3 *db);
int ok_raw_size(sqlite3 *db, int64_t *size);
int ok_raw_read(sqlite3 *db, void *to, int amount, int64_t offset);

#endif
