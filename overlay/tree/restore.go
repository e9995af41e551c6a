package tree

import (
	"context"
	"io"
	"os"
	"runtime"

	"overkeep/overlay/nar"
)

// Restore makes newName of dst, which must not exist, from a NAR. r must end with the
// archive. What is wrong with the archive is a *nar.FormatError; after an error a part may
// be left at newName, as with Copy. Options.Progress is told of bytes taken from r.
func Restore(ctx context.Context, r io.Reader, dst *os.File, newName string, o Options) (Result, error) {
	defer runtime.KeepAlive(dst)
	if err := single(newName); err != nil {
		return Result{}, err
	}
	t, err := newTarget(int(dst.Fd()), newName, o)
	if err != nil {
		return Result{}, err
	}
	defer t.close()
	in := &hashing{ctx: ctx, r: r, out: newStream()}
	in.out.begin(nil, o.Progress)
	defer in.out.stop()
	var res Result
	if err := restore(nar.NewReader(in), t, newName, &res); err != nil {
		return Result{}, err
	}
	// What is read was the archive and nothing else.
	if res.NarHash, res.NarSize, err = in.out.end(); err != nil {
		return Result{}, err
	}
	res.Blocks = t.blocks
	return res, nil
}

// hashing passes on what it reads.
type hashing struct {
	ctx context.Context
	r   io.Reader
	out *stream
}

func (h *hashing) Read(p []byte) (int, error) {
	if err := h.ctx.Err(); err != nil {
		return 0, err
	}
	p = p[:min(len(p), pieceSize/2)]
	n, err := h.r.Read(p)
	if n > 0 {
		if err := h.out.room(n); err != nil {
			return 0, err
		}
		h.out.cur = append(h.out.cur, p[:n]...)
	}
	return n, err
}

func restore(in *nar.Reader, t *target, newName string, res *Result) error {
	buf := make([]byte, 128<<10)
	for {
		e, err := in.Next()
		if err == io.EOF {
			return in.End()
		}
		if err != nil {
			return err
		}
		name := e.Name
		if name == "" {
			name = newName
		}
		switch e.Kind {
		case nar.Directory:
			res.Dirs++
			err = t.down(name)
		case nar.Up:
			err = t.up()
		case nar.Symlink:
			res.Links++
			err = t.symlink(name, e.Target)
		case nar.Regular:
			res.Files++
			res.Bytes += e.Size
			err = restoreFile(in, t, name, e, buf)
		}
		if err != nil {
			return err
		}
	}
}

func restoreFile(in *nar.Reader, t *target, name string, e nar.Entry, buf []byte) error {
	f, err := t.create(name, e.Executable, e.Size)
	if err != nil {
		return err
	}
	for off := int64(0); off < e.Size; {
		// Whole blocks, so that none is written twice.
		n, err := io.ReadFull(in, buf[:min(int64(len(buf)), e.Size-off)])
		if err == nil {
			err = f.write(buf[:n], off)
		}
		if err != nil {
			f.abandon()
			return err
		}
		off += int64(n)
	}
	return f.close()
}
