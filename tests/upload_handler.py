"""What the hub does when something is uploaded to it, for a server of the tests."""

import base64
import hashlib
import json

from servers import COMMIT, Handler


class UploadHandler(Handler):
    """The calls of the hub that an upload makes. What is committed comes to lie in the served folder.

    Files of weights go by git LFS, others within the commit, as on the hub; which storage that LFS has is the client's
    affair, and the tests have it use the basic one.
    """

    def do_POST(self):
        server, path = self.server_of, self.path
        server.requests.append(path)
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = server.faults.status(path)
        if status is not None:
            self.tell({"error": "no"}, status)
        elif path == "/api/repos/create":
            (server.folder / "created.json").write_bytes(body)
            self.tell({"url": f"{server.url}/org/made", "id": "org/made"})
        elif path == "/api/validate-yaml":
            self.tell({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = [("lfs" if file["path"].endswith(".safetensors") else "regular") for file in self.files(body)]
            told = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(self.files(body), modes, strict=True)
            ]
            self.tell({"files": told})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            self.tell({"transfer": "basic", "objects": [self.object(one) for one in wanted]})
        elif path.endswith("/commit/main"):
            self.commit(body)
        else:
            self.tell({"error": path}, 404)

    def do_PUT(self):
        body = self.body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        (self.server_of.folder / oid).write_bytes(body)
        self.tell({})

    def body(self):
        """Of known length, or in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def files(self, body):
        return json.loads(body)["files"]

    def object(self, one):
        actions = {"upload": {"href": f"{self.server_of.url}/lfs/{one['oid']}"}}
        return {"oid": one["oid"], "size": one["size"], "actions": actions}

    def commit(self, body):
        folder = self.server_of.folder / "repository"
        folder.mkdir(exist_ok=True)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if "path" in value:
                (folder / value["path"]).parent.mkdir(exist_ok=True)
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes((self.server_of.folder / value["oid"]).read_bytes())
        url = f"{self.server_of.url}/org/made/commit/{COMMIT}"
        self.tell({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def tell(self, document, status=200):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
