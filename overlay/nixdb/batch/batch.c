// Stepping in C: a call from Go costs more than a row, so one call fills a buffer
// with thousands of them. Nothing is judged here but SQLite's type of a value.
#include <string.h>

#include "batch.h"

int sqlite3_open_v2(const char *, sqlite3 **, int, const char *);
int sqlite3_close_v2(sqlite3 *);
int sqlite3_busy_timeout(sqlite3 *, int);
int sqlite3_exec(sqlite3 *, const char *, int (*)(void *, int, char **, char **), void *, char **);
int sqlite3_limit(sqlite3 *, int, int);
int sqlite3_db_config(sqlite3 *, int, ...);
int sqlite3_extended_result_codes(sqlite3 *, int);
const char *sqlite3_errmsg(sqlite3 *);
int sqlite3_prepare_v2(sqlite3 *, const char *, int, sqlite3_stmt **, const char **);
int sqlite3_bind_int64(sqlite3_stmt *, int, long long);
int sqlite3_bind_text(sqlite3_stmt *, int, const char *, int, void (*)(void *));
int sqlite3_step(sqlite3_stmt *);
int sqlite3_reset(sqlite3_stmt *);
int sqlite3_finalize(sqlite3_stmt *);
int sqlite3_column_count(sqlite3_stmt *);
int sqlite3_column_type(sqlite3_stmt *, int);
long long sqlite3_column_int64(sqlite3_stmt *, int);
const unsigned char *sqlite3_column_text(sqlite3_stmt *, int);
int sqlite3_column_bytes(sqlite3_stmt *, int);
int sqlite3_stmt_readonly(sqlite3_stmt *);

enum {
	SQLITE_OK = 0,
	SQLITE_NOMEM = 7,
	SQLITE_MISUSE = 21,
	SQLITE_ROW = 100,
	SQLITE_INTEGER = 1,
	SQLITE_TEXT = 3,
	SQLITE_OPEN_READONLY = 0x1,
	SQLITE_OPEN_URI = 0x40,
	SQLITE_OPEN_NOMUTEX = 0x8000,
	SQLITE_LIMIT_LENGTH = 0,
	SQLITE_DBCONFIG_DEFENSIVE = 1010,
	SQLITE_DBCONFIG_TRUSTED_SCHEMA = 1017,
};

// No row of Nix comes near it; a row beyond it ends the statement with
// SQLITE_TOOBIG before memory is taken for it.
enum { LONGEST_ROW = 64 << 20 };

int ok_open(const char *uri, int busy_ms, sqlite3 **db) {
	int rc = sqlite3_open_v2(uri, db, SQLITE_OPEN_READONLY | SQLITE_OPEN_URI | SQLITE_OPEN_NOMUTEX, 0);
	if (rc != SQLITE_OK)
		return rc;
	sqlite3_extended_result_codes(*db, 1);
	sqlite3_busy_timeout(*db, busy_ms);
	sqlite3_limit(*db, SQLITE_LIMIT_LENGTH, LONGEST_ROW);
	// For files of others, see sqlite.org/security.html. Sorting in memory only:
	// a temporary file would be a plaintext copy of names.
	sqlite3_db_config(*db, SQLITE_DBCONFIG_DEFENSIVE, 1, 0);
	sqlite3_db_config(*db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, 0);
	return sqlite3_exec(*db, "pragma query_only=1; pragma temp_store=memory; pragma cell_size_check=1", 0, 0, 0);
}

int ok_prepare(sqlite3 *db, const char *sql, int len, int columns, sqlite3_stmt **stmt) {
	int rc = sqlite3_prepare_v2(db, sql, len, stmt, 0);
	if (rc != SQLITE_OK)
		return rc;
	if (*stmt == 0 || sqlite3_column_count(*stmt) != columns || !sqlite3_stmt_readonly(*stmt)) {
		sqlite3_finalize(*stmt);
		*stmt = 0;
		return SQLITE_MISUSE;
	}
	return SQLITE_OK;
}

int ok_bind_int(sqlite3_stmt *stmt, int n, int64_t v) { return sqlite3_bind_int64(stmt, n, v); }

int ok_bind_text(sqlite3_stmt *stmt, int n, const char *text, int len) {
	return sqlite3_bind_text(stmt, n, text, len, (void (*)(void *))-1 /* SQLITE_TRANSIENT */);
}

// ok_rows fills cells and text until one is full (SQLITE_ROW), the rows end
// (SQLITE_DONE) or an error. A row that no longer fits is kept for the next call:
// *pending. If it is the first, so that *rows is 0, the text buffer must grow; with
// columns*longest bytes it holds any row.
int ok_rows(sqlite3_stmt *stmt, int columns, int longest, ok_cell *cells, int max_rows,
	char *text, int text_cap, int *pending, int *rows) {
	int used = 0;
	*rows = 0;
	while (*rows < max_rows) {
		if (!*pending) {
			int rc = sqlite3_step(stmt);
			if (rc != SQLITE_ROW)
				return rc;
		}
		*pending = 0;
		for (int c = 0; c < columns; c++) {
			ok_cell *cell = &cells[*rows * columns + c];
			cell->type = (uint32_t)sqlite3_column_type(stmt, c);
			cell->len = 0;
			cell->i = 0;
			if (cell->type == SQLITE_INTEGER) {
				cell->i = sqlite3_column_int64(stmt, c);
			} else if (cell->type == SQLITE_TEXT) {
				const unsigned char *s = sqlite3_column_text(stmt, c);
				int n = sqlite3_column_bytes(stmt, c);
				if (s == 0)
					return SQLITE_NOMEM;
				cell->len = (uint32_t)n;
				if (n > longest) {
					cell->type = OK_TOO_LONG;
				} else if (n > text_cap - used) {
					*pending = 1;
					return SQLITE_ROW;
				} else {
					memcpy(text + used, s, (size_t)n);
					cell->i = used;
					used += n;
				}
			}
		}
		++*rows;
	}
	return SQLITE_ROW;
}

// ok_pairs fills pairs with two integers a row, as ok_rows does. A row in which
// one of them is none is not taken but counted in *wrong.
int ok_pairs(sqlite3_stmt *stmt, int64_t *pairs, int max_pairs, int *pairs_read, int *wrong) {
	int n = 0, rc = SQLITE_ROW;
	while (n < max_pairs) {
		rc = sqlite3_step(stmt);
		if (rc != SQLITE_ROW)
			break;
		if (sqlite3_column_type(stmt, 0) != SQLITE_INTEGER || sqlite3_column_type(stmt, 1) != SQLITE_INTEGER) {
			++*wrong;
			continue;
		}
		pairs[2 * n] = sqlite3_column_int64(stmt, 0);
		pairs[2 * n + 1] = sqlite3_column_int64(stmt, 1);
		n++;
	}
	*pairs_read = n;
	return rc;
}

const char *ok_message(sqlite3 *db) { return sqlite3_errmsg(db); }
int ok_reset(sqlite3_stmt *stmt) { return sqlite3_reset(stmt); }
void ok_finalize(sqlite3_stmt *stmt) { sqlite3_finalize(stmt); }
int ok_close(sqlite3 *db) { return sqlite3_close_v2(db); }
